"""Training from a LLaMA-Factory style YAML: an adapter over a base in 4 bits (NF4), or what else it asks for.

    edge train examples/smollm2_qlora.yaml learning_rate=2e-4

The adapter goes to OUTPUT_DIR/adapter in peft's format, with tokenizer, chat template and edge.json; fully
trained weights go to OUTPUT_DIR/merged. Logs, checkpoints and pictures lie in OUTPUT_DIR itself.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from convert.config import TrainConfig
from convert.data import prepare
from convert.model import chat_format
from convert.model.hf_folder import check_folder
from convert.train import (
    checkpoint,
    cuda_graphs,
    distributed,
    fsdp,
    init_adapter,
    loftq,
    memory_estimate,
    plots,
    sample_answers,
    signals,
)
from convert.train import trainer as loop
from convert.train.callbacks import Actions, Watch
from convert.train.load_model import (
    Place,
    add_adapter,
    choose_place,
    load_model,
    quantized_layers,
    unfreeze,
)
from convert.train.losses import Preference, reference
from edge.artefact import manifest
from edge.errors import EdgeError, ExistsError, InputError

BLOCK = 64
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")
# Above this, eager attention's square matrices cost more than they save on a CPU.
_EAGER_LONGEST = 512
_ANSWER = 48


class Stopped(EdgeError):
    """The user asked for an end; a checkpoint was written."""

    exit_code = 130


def base_folder(name: str, revision: str | None) -> Path:
    """The folder of the base model, checked: `name` itself, or what the hub has under it."""
    folder = Path(name)
    if not folder.is_dir():
        from convert.model.hub import resolve

        folder = resolve(name, revision)
    return check_folder(folder, shown=name).path


def run(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    again: str = "edge train CONFIG.yaml --resume",
) -> Path:
    """Train as `config` says and publish the result under output_dir; its path is returned.

    again: the command that goes on with this run, for messages. Raises EdgeError subclasses for a base model,
    data or values that cannot be used, and at the first loss that is no number; ExistsError where an earlier
    result stands and `overwrite` was not given; Stopped, with a checkpoint written, after Ctrl-C.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    folder = Path(config.output_dir)
    target = folder / ("merged" if config.finetuning_type == "full" else "adapter")
    resumed = _starting_point(config, folder, target, overwrite)
    if config.plot_loss:
        plots.check()
    base = base_folder(config.model_name_or_path, config.model_revision)
    form = chat_format.load(base)
    config, about = init_adapter.shaped(config) if config.adapter_name_or_path else (config, [])
    said = [*config.warnings, *about, chat_format.check_name(config.template, form), *form.warnings]
    made = prepare.prepare(config, form)
    said += made.notes
    if config.default_system is not None:
        said.append("default_system is trained in: send the same system message when you ask the model")
    place = choose_place(config)
    world = distributed.join(cpu=place.device == "cpu")
    if fsdp.asked(config, world):
        world = dataclasses.replace(world, spread=True)
    if not world.first:
        console = Console(quiet=True)
    said += _doubts(config, made, world.size)
    if resumed is not None:
        said += [f"{one}: passed over" for one in resumed.passed]
        said += checkpoint.check_same(resumed, config, data=made.digest(), processes=world.size)
    for line in [*filter(None, said), *made.report.lines(), *place.notes]:
        console.print(f"note: {line}", style="yellow")
    console.print(_plan(config, made, place, world))
    eager = place.device == "cpu" and made.longest <= _EAGER_LONGEST
    shards = world.size if world.spread else 1
    passes = memory_estimate.check(
        base, config, made, place, eager=eager, console=console, shards=shards
    ).passes
    try:
        with loop.out_of_memory(config):
            return _train(
                config, folder, target, base, form, made, place, world, resumed, eager, passes, console, again
            )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        whole = [str(one) for _, one in checkpoint.listed(folder)][-1:]
        left = f"the last whole checkpoint is {whole[0]}" if whole else "no checkpoint was written before"
        raise EdgeError(
            f"the disk is full: {error.filename or folder}; {left}", f"free some space, then: {again}"
        ) from error
    finally:
        distributed.leave()


def _starting_point(
    config: TrainConfig, folder: Path, target: Path, overwrite: bool
) -> checkpoint.Found | None:
    """The checkpoint to go on from, None to begin anew. Raises ExistsError where something would be lost."""
    if config.resume_from_checkpoint is not None:
        manifest.check_target(target, True)
        return checkpoint.find(folder, config.resume_from_checkpoint)
    manifest.check_target(target, overwrite)
    old = [one for _, one in checkpoint.listed(folder) if (one / manifest.FILE).is_file()]
    if old and not overwrite:
        raise ExistsError(
            f"{old[-1]} is left of a run that did not end",
            "add --resume to go on with it, or --overwrite to begin anew",
        )
    return None


def _train(
    config: TrainConfig,
    folder: Path,
    target: Path,
    base: Path,
    form: chat_format.ChatFormat,
    made: prepare.Prepared,
    place: Place,
    world: distributed.World,
    resumed: checkpoint.Found | None,
    eager: bool,
    passes: int,
    console: Console,
    again: str,
) -> Path:
    full = config.finetuning_type == "full"
    weights = dataclasses.replace(place, dtype=torch.float32) if full else place
    attention = cuda_graphs.attention_name(place, eager=eager)
    model = load_model(
        base,
        weights,
        double_quant=config.double_quantization,
        attention=attention,
        spread=world.spread,
    )
    quantized = quantized_layers(model) if place.four_bit else []
    model = unfreeze(model, config) if full else add_adapter(model, config)
    if config.adapter_name_or_path:
        init_adapter.load(model, config)
    pissa = _pissa_start(model) if config.pissa_init else None
    if config.loftq_init and place.four_bit and resumed is None:
        share = loftq.begin(model, base)
        console.print(f"the adapter begins with {share:.0%} of what 4 bits lost of the weights")
    if world.spread:
        fsdp.spread(model, place.device)
    head, how = cuda_graphs.head(model, config, place, passes=passes, spread=world.spread)
    if how:
        console.print(how)
    objective: Any = head
    if config.stage == "dpo":
        model.eval()
        size = config.per_device_eval_batch_size
        known = {}
        if config.pref_loss not in ("orpo", "simpo"):
            known = reference(head, [*made.train, *made.held], place.device, size)  # type: ignore[list-item]
        objective = Preference(head, config, known)
    trainer = loop.Loop(
        model, made.train, config, device=place.device, dtype=place.dtype, objective=objective, world=world
    )
    best = checkpoint.Best()
    if resumed is not None:
        best = checkpoint.restore(trainer, resumed)
        if world.first:
            checkpoint.set_aside(resumed)
        console.print(
            f"going on from {resumed.folder}: {resumed.step} of {trainer.state.total} steps are done"
        )
        if resumed.step >= trainer.state.total and (target / manifest.FILE).is_file():
            raise EdgeError(
                f"nothing is left to do: {resumed.folder} has done {resumed.step} of "
                f"{trainer.state.total} steps",
                "raise num_train_epochs or max_steps to train on",
            )
    folder.mkdir(parents=True, exist_ok=True)
    if resumed is None and world.first:
        checkpoint.remove_all(folder)
    world.wait()
    digest = made.digest()

    def evaluate() -> float:
        size = config.per_device_eval_batch_size
        return loop.evaluate(
            model, made.held, size=size, device=place.device, objective=objective, world=world
        )

    def save(best: checkpoint.Best) -> Path:
        compute = {"device": place.device, "compute_dtype": _name(place.dtype)}
        return checkpoint.save(
            trainer, folder, config, data=digest, base=_parent(base, config), best=best, compute=compute
        )

    asked = prepare.held_rows(config)[: config.eval_answers] if made.held and config.eval_answers else []
    prompts = [sample_answers.question(row, form, prepare.rules(config)) for row in asked]

    def ask() -> list[tuple[str, str]]:
        found = sample_answers.generate(
            model,
            form,
            prompts,
            device=place.device,
            max_new_tokens=_ANSWER,
            size=len(prompts),
            together=world.spread,
        )
        return [(str(row.messages[-2 if not row.chosen else -1]["content"]), text)
                for row, text in zip(asked, found, strict=True)]  # fmt: skip

    actions = Actions(evaluate if made.held else None, save, ask if prompts else list)
    with Watch(trainer, config, folder, len(made.train), actions, console, best) as watch:
        with signals.asked_to_stop(lambda line: console.print(line, style="yellow")) as stop:
            try:
                state = trainer.run(watch, stop=stop)
            except EdgeError as error:
                whole = [str(one) for _, one in checkpoint.listed(folder)][-1:]
                left = (
                    f"the last whole checkpoint is {whole[0]}"
                    if whole
                    else "no checkpoint was written before"
                )
                raise EdgeError(error.message, f"{error.hint}; {left}") from error
        if state.stopped:
            where = watch.save() if state.step else None
            raise Stopped(
                f"stopped at step {state.step} of {state.total}"
                + (f"; {where} has all that is needed" if where else ""),
                f"go on with: {again}" if where else "nothing was trained yet",
            )
        found: dict[str, Any] = {"train_loss": state.loss}
        if watch.best.folder and config.keeps_best and watch.best.step != state.step:
            checkpoint.load_weights(model, Path(watch.best.folder))
            console.print(f"the weights are those of step {watch.best.step}, the best evaluation")
            found |= {"best_step": watch.best.step, "eval_loss": watch.best.loss}
        elif made.held:
            if not any("eval_loss" in line and line["current_steps"] == state.step for line in state.history):
                watch.evaluate(state)
            found["eval_loss"] = next(
                line["eval_loss"] for line in reversed(state.history) if "eval_loss" in line
            )
        watch.finish(_results(state, found))
    if world.spread:
        fsdp.end(model)
    if world.first:
        with manifest.publish(target, overwrite=overwrite_ok(target)) as partial:
            _write(model, partial, base, form, full, pissa)
            manifest.write(
                partial,
                manifest.Manifest(
                    stage="merged" if full else "adapter",
                    name=folder.absolute().name,
                    **_parent(base, config),
                    settings=_settings(config, place, quantized, made, state, world.size, found),
                    chat_template=manifest.text_digest(form.source),
                    stop_ids=form.stop_ids,
                    thinking=chat_format.thinking_mode(form, config.enable_thinking),
                    versions=manifest.versions(*_PACKAGES),
                ),
            )
    world.wait()
    console.print(
        f"{target}: {state.step} steps in {state.seconds:.0f} s, {state.tokens_per_second:.0f} tokens/s, "
        f"last loss {state.loss:.4f}"
    )
    return target


def overwrite_ok(target: Path) -> bool:
    """Whether what stands at `target` may be replaced: that was settled before training began."""
    return (target / manifest.FILE).is_file()


def _plan(config: TrainConfig, made: prepare.Prepared, place: Place, world: distributed.World) -> str:
    steps = loop.total_steps(config, len(made.train), world.size)
    if config.finetuning_type == "full":
        kind = "32-bit, every weight trained"
    else:
        kind = "NF4" if place.four_bit else "16-bit" if place.dtype != torch.float32 else "32-bit"
    what = "pairs" if config.stage == "dpo" else "rows"
    many = f" on each of {world.size} processes" if world.size > 1 else ""
    many = f", spread over {world.size} processes" if world.spread else many
    return (
        f"{made.rows} {what} to train on, {len(made.held)} held out, longest {made.longest} tokens, "
        f"{steps} steps; {Path(config.model_name_or_path).name} in {kind} on {place.device}{many}, "
        f"computing in {_name(place.dtype)}"
    )


def _doubts(config: TrainConfig, made: prepare.Prepared, processes: int) -> list[str]:
    """Warnings on what the settings make of these rows."""
    said = []
    rows = len(made.train)
    steps = loop.total_steps(config, rows, processes)
    in_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    if steps < 20:
        said.append(
            f"only {steps} optimizer steps: {in_step} of {rows} rows go into each; "
            "lower gradient_accumulation_steps or the batch size, or raise num_train_epochs"
        )
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    if warmup >= steps > 1:
        said.append(f"all {steps} steps warm up (warmup {warmup}): the learning rate never arrives")
    if made.held and not config.eval_dataset and len(made.held) > made.rows:
        said.append(
            f"val_size {config.val_size:g} holds out more rows ({len(made.held)}) than are left ({made.rows})"
        )
    if made.held and len(made.held) < 5:
        said.append(f"the validation loss of {len(made.held)} rows says little")
    return said


def _parent(base: Path, config: TrainConfig) -> dict[str, Any]:
    """base_model and parents of the adapter's manifest."""
    if (base / manifest.FILE).is_file():
        known = manifest.read(base)
        return {
            "base_model": known.base_model or known.name,
            "parents": [known.parent(base.absolute())],
        }
    parent = {"stage": "model", "path": str(base.absolute()), "digest": ""}
    return {"base_model": config.model_name_or_path, "parents": [parent]}


def _settings(
    config: TrainConfig,
    place: Place,
    quantized: list[str],
    made: prepare.Prepared,
    state: loop.Progress,
    processes: int,
    found: dict[str, Any],
) -> dict[str, Any]:
    return {
        **{key: value for key, value in dataclasses.asdict(config).items() if key != "warnings"},
        "alpha": config.alpha,
        "device": place.device,
        "compute_dtype": _name(place.dtype),
        "quantized": quantized,
        "quant_block": BLOCK,
        "data": made.report.numbers(),
        "data_digest": made.digest(),
        "processes": processes,
        "steps": state.step,
        "seconds": round(state.seconds, 2),
        "tokens_per_second": round(state.tokens_per_second, 1),
        **found,
    }


def _results(state: loop.Progress, found: dict[str, Any]) -> dict[str, Any]:
    results = {
        **found,
        "epoch": state.epoch,
        "train_runtime": round(state.seconds, 2),
        "train_steps_per_second": round(state.step / state.seconds, 3) if state.seconds else 0.0,
        "num_input_tokens_seen": state.tokens,
    }
    if "eval_loss" in found:
        results["perplexity"] = math.exp(min(found["eval_loss"], 700.0))
    return results


def _pissa_start(model: Any) -> Path:
    """The adapter as it begins: what its principal components were is needed to turn it into a plain one."""
    start = Path(tempfile.mkdtemp(prefix="edge-pissa-")) / "pissa_init"
    # Saved as what is loaded again, not initialised anew.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start, save_embedding_layers=False)
    return start


def _write(
    model: Any, folder: Path, base: Path, form: chat_format.ChatFormat, full: bool, pissa: Path | None
) -> None:
    if full:
        _write_weights(model, folder, base, form)
    else:
        more = {} if pissa is None else {"path_initial_model_for_weight_conversion": str(pissa)}
        if pissa is not None:
            model.peft_config["default"].init_lora_weights = "pissa"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Not "auto": that would ask a hub whether the base's vocabulary was changed.
            model.save_pretrained(folder, save_embedding_layers=False, **more)
        if pissa is not None:
            shutil.rmtree(pissa.parent, ignore_errors=True)
        (folder / "README.md").unlink(missing_ok=True)
    copy_tokenizer(form.folder, folder, form.source)


def _write_weights(model: Any, folder: Path, base: Path, form: chat_format.ChatFormat) -> None:
    """All weights in float16, beside the base's own configuration."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.to(torch.float16)).all():
            raise InputError(f"{name} does not fit into float16, or holds no numbers", "lower learning_rate")
    model.to(torch.float16).save_pretrained(folder)
    config = json.loads((base / "config.json").read_text(encoding="utf-8-sig"))
    config["dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"] = "float16"
    path = base / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
    for name, value in (
        ("config", config),
        ("generation_config", {**generation, "eos_token_id": form.stop_ids}),
    ):
        text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def copy_tokenizer(source: Path, target: Path, chat_template: str) -> None:
    """The tokenizer's files byte for byte, and the chat template as a file of its own."""
    for name in chat_format.FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    (target / "chat_template.jinja").write_bytes(chat_template.encode("utf-8"))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
