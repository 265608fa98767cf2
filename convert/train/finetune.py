"""Training from a LLaMA-Factory style YAML: a LoRA adapter over an NF4 base, or what else it asks for.

    edge train examples/smollm2_qlora.yaml learning_rate=2e-4

The adapter goes to OUTPUT_DIR/adapter in peft's format, with tokenizer, chat template and edge.json; fully
trained weights go to OUTPUT_DIR/merged. Logs, checkpoints and pictures lie in OUTPUT_DIR itself.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import platform
import shutil
import tempfile
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from convert.config import PATHS, TrainConfig, recorded
from convert.data import prepare
from convert.data.encode import Sample
from convert.model import chat_format, hub
from convert.model.hf_folder import INDEX
from convert.train import (
    checkpoint,
    cuda_graphs,
    deepspeed,
    distributed,
    fsdp,
    init_adapter,
    loftq,
    memory_estimate,
    run_lock,
    sample_answers,
    signals,
    time_estimate,
    trackers,
    trainer,
)
from convert.train.callbacks import Watch, duration
from convert.train.load_model import (
    NF4_BLOCK,
    Place,
    add_adapter,
    autocast,
    choose_place,
    dtype_name,
    grow,
    load_model,
    quantized_layers,
    unfreeze,
)
from convert.train.losses import Accuracy, Feedback, LossHead, Objective, Preference, reference
from edge.artefact import json_file, manifest
from edge.errors import EdgeError, ExistsError, InputError, UsageError
from edge.progress import report
from edge.prompt import Prompt

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")
# Longest sampled answer at an evaluation, in tokens.
_ANSWER_TOKENS = 48


class Stopped(EdgeError):
    """The user asked for an end; a checkpoint was written."""

    exit_code = 130


def run(
    config: TrainConfig,
    *,
    overwrite: bool = False,
    console: Console | None = None,
    again: str = "edge train CONFIG.yaml --resume",
) -> Path:
    """Train as `config` says and publish the result under output_dir; its path is returned.

    again: the command that resumes this run, for messages. Raises EdgeError subclasses for a base model, data
    or values that cannot be used, and at the first loss that is NaN or infinite; ExistsError where an earlier
    result stands and `overwrite` was not given, or another training runs there; Stopped, with a checkpoint
    written, after Ctrl-C. Where several processes train, see also `distributed.together`.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    try:
        with _together(config) as world, run_lock.hold(Path(config.output_dir)):
            job = Run.begin(config, overwrite=overwrite, console=console, again=again, world=world)
            with trainer.out_of_memory(job.config):
                job.load()
                with cuda_graphs.own_stream(job.place):
                    job.build_objective()
                    job.resume()
                    job.fit()
                    return job.publish()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        folder = Path(config.output_dir)
        # Paths under output_dir are said as they were given; another may be on another disk.
        file = Path(error.filename or folder)
        inside = file.absolute().is_relative_to(folder.absolute())
        raise EdgeError(
            f"the disk is full: {folder if inside else file}; {_last_checkpoint(folder)}",
            f"free some space, then: {again}",
        ) from error


def _together(config: TrainConfig) -> AbstractContextManager[distributed.World]:
    place = choose_place(replace(config, quantization_bit=None))
    return distributed.together(cpu=place.device == "cpu", timeout=config.ddp_timeout)


def plan(config: TrainConfig, *, overwrite: bool = False, measure: bool = False) -> dict[str, Any]:
    """Say what `run` would train, and what memory and time that takes; the figures, in bytes and seconds.

    measure: load the model and try a few steps, where no earlier training tells the speed. Raises as `run`.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with _together(config) as world:
        return _plan(Run.begin(config, overwrite=overwrite, console=console, again="", world=world), measure)


def _plan(job: Run, measure: bool) -> dict[str, Any]:
    config, console = job.config, job.console
    steps = trainer.total_steps(config, len(job.data.train), job.world.shares)
    tokens = time_estimate.tokens(config, job.data.train, steps, job.world.shares)
    speed, source = time_estimate.earlier(job.folder, job.kind()) or (0.0, "")
    if not speed and measure:
        with trainer.out_of_memory(job.config):
            speed, source = job.try_steps(), f"{time_estimate.TRIED - 1} steps that were tried"
    if speed:
        console.print(
            f"time: about {duration(tokens / speed)}, by the {speed:.0f} tokens/s of {source} on this "
            "machine; evaluations and checkpoints come on top"
        )
    else:
        console.print("time: not known before the first steps; --measure tries a few")
    return {
        "rows": job.data.rows,
        "held_out": job.data.held_rows,
        "longest": job.data.longest,
        "steps": steps,
        "tokens": tokens,
        "seconds": tokens / speed if speed else None,
        "speed": speed,
        "speed_of": str(source),
        "device": job.place.device,
        "memory": job.need.total,
        "free": memory_estimate.free(job.place),
        "notes": [*job.notes(), *job.data.report.lines()],
    }


@dataclass
class Run:
    """One training run: what it is made from, and what its steps build from that.

    `begin` reads and checks everything but the weights. Then, in this order: load; and within
    `cuda_graphs.own_stream` build_objective, resume, fit, publish. resumed: the checkpoint to resume from.
    given: the configuration that `start` makes the base of. need: the memory that is estimated. quantized:
    names of the layers in 4 or 8 bits. pissa: the adapter as PiSSA initialised it.
    """

    config: TrainConfig
    base: Path
    chat: chat_format.ChatFormat
    data: prepare.Prepared
    place: Place
    world: distributed.World
    resumed: checkpoint.Checkpoint | None
    console: Console
    again: str
    given: TrainConfig
    need: memory_estimate.Estimate = field(init=False)
    model: Any = None
    objective: Objective = field(init=False)
    head: LossHead = field(init=False)
    loop: trainer.Loop = field(init=False)
    best: checkpoint.Best = field(default_factory=checkpoint.Best)
    quantized: list[str] = field(default_factory=list)
    pissa: Path | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        config: TrainConfig,
        *,
        overwrite: bool,
        console: Console,
        again: str,
        world: distributed.World | None = None,
    ) -> Run:
        """Read the base's configuration, its chat format and the data; say what will be trained.

        world: the processes that train together; none: this one alone. Raises EdgeError subclasses where any
        of these cannot be used, differs between the processes, or where the memory does not suffice.
        """
        world = world or distributed.World()
        trackers.named(config)
        report("reading the data")
        resumed = _starting_point(config, overwrite or config.overwrite_output_dir, world)
        if resumed is not None:
            world = replace(world, begun=resumed.settings.get("processes", world.size))
        base = hub.resolve(config.model_name_or_path, config.model_revision, config.cache_dir)
        chat = prepare.chat_of(config, base)
        about: list[str] = []
        if config.adapter_name_or_path and not config.create_new_adapter:
            config, about = init_adapter.shaped(config)
        notes = [*config.warnings, *about, *chat.warnings]
        data = prepare.prepare(config, chat)
        place = choose_place(config)
        config, about = deepspeed.mapped(config, world)
        notes += about
        if fsdp.asked(config, world):
            world = replace(world, sharded=True)
        if not world.first:
            console = Console(quiet=True)
        given = config
        if init_adapter.merged_first(config) or init_adapter.scaled(base, config):
            config = init_adapter.on_start(config)
            notes.append(
                f"the base of what is trained is {config.model_name_or_path}, made of what it begins with"
            )
        elif config.rope_scaling:
            notes.append(f"rope_scaling changes nothing: cutoff_len {config.cutoff_len} fits the model")
        job = cls(config, base, chat, data, place, world, resumed, console, again, given=given)
        notes += job.compare()
        for line in [*notes, *job.notes(), *data.report.lines(), *place.notes]:
            console.print(f"note: {line}", style="yellow")
        console.print(job.plan())
        shards = world.size if world.sharded else 1
        tokens = chat.tokenizer.get_vocab_size()
        job.need = memory_estimate.check(
            base,
            config,
            data,
            place,
            console=console,
            shards=shards,
            tokens=tokens,
            alone=world.size == 1,
        )
        return job

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def target(self) -> Path:
        return _target(self.config)

    @property
    def full(self) -> bool:
        return self.config.whole

    @functools.cached_property
    def digest(self) -> str:
        return self.data.digest()

    @property
    def thinking(self) -> str | None:
        """The artefact's thinking mode; plain text teaches none."""
        if self.config.stage == "pt":
            return None
        return chat_format.thinking_mode(self.chat, self.config.enable_thinking)

    @functools.cached_property
    def questions(self) -> list[tuple[str, Prompt]]:
        """(question, prompt) of the held-out rows to answer at each evaluation."""
        unread = self.config.stage == "pt" or self.config.tokenized_path is not None
        if not self.data.held or not self.config.eval_answers or unread:
            return []
        rules = prepare.rules(self.config)
        return [
            (
                str(row.messages[-1 if row.chosen else -2]["content"]),
                sample_answers.question(row, self.chat, rules),
            )
            for row in prepare.held_rows(self.config)[: self.config.eval_answers]
        ]

    def compare(self) -> list[str]:
        """Compare what the processes train from; returns a note where output_dir is not shared by them.

        Raises UsageError where it differs.
        """
        if self.world.size == 1:
            return []
        paths = (*PATHS, "cache_dir", "tokenized_path", "deepspeed", "adapter_name_or_path")
        keys = {key: value for key, value in recorded(self.config).items() if key not in paths}
        files = sorted(path for path in self.base.glob("*") if path.suffix in (".json", ".safetensors"))
        self.world.agree(
            {
                **manifest.versions("edge", *_PACKAGES),
                **keys,
                **{f"the size of the model's {path.name}": path.stat().st_size for path in files},
                "the rows' digest": self.digest,
                "the device": self.place.device,
                "the type that computes": dtype_name(self.place.dtype),
                "the checkpoint": self.resumed and self.resumed.folder.name,
            }
        )
        lock = self.folder / run_lock.FILE
        locks = self.world.gather(lock.read_text(encoding="utf-8") if lock.is_file() else "")
        if set(locks) == {locks[0]}:
            return []
        return [
            f"output_dir {self.folder} is not one folder for all processes: checkpoints and result lie on "
            f"{platform.node()} alone; to resume, copy the last checkpoint to the other nodes"
        ]

    def notes(self) -> list[str]:
        """Warnings on what the settings make of these rows. Raises UsageError for another run to resume."""
        config, data, rows = self.config, self.data, len(self.data.train)
        notes = list(data.notes)
        if config.default_system is not None:
            notes.append("default_system is trained in: send the same system message when you ask the model")
        steps = trainer.total_steps(config, rows, self.world.shares)
        in_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * self.world.shares
        if steps < 20:
            notes.append(
                f"only {steps} optimizer steps: {in_step} of {rows} rows go into each; "
                "lower gradient_accumulation_steps or the batch size, or raise num_train_epochs"
            )
        warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
        if warmup >= steps > 1:
            notes.append(
                f"all {steps} steps warm up (warmup {warmup}): the peak learning rate is never reached"
            )
        held = data.held_rows
        if held > data.rows and not config.eval_dataset:
            notes.append(
                f"val_size {config.val_size:g} holds out more rows ({held}) than are left ({data.rows})"
            )
        if 0 < held < 5:
            notes.append(f"the validation loss of {held} rows says little")
        if self.resumed is not None:
            notes += [f"{reason}: passed over" for reason in self.resumed.passed]
            notes += checkpoint.check_same(self.resumed, config, data=self.digest)
            if self.world.size != self.world.shares:
                notes.append(
                    f"{self.resumed.folder.name} is of {self.world.shares} processes: a step keeps as many "
                    f"micro-batches, on {self.world.size} now"
                )
        return notes

    def plan(self) -> str:
        """What will be trained, on what, for how long, in one line."""
        config, data, place, world = self.config, self.data, self.place, self.world
        if self.full:
            every = "some layers" if config.finetuning_type == "freeze" else "every weight"
            weights = f"32-bit, {every} trained"
        else:
            whole = "16-bit" if place.dtype != torch.float32 else "32-bit"
            weights = "NF4" if place.four_bit else "8-bit" if place.eight_bit else whole
        rows = "pairs" if config.stage == "dpo" else "rows"
        processes = f" on each of {world.size} processes" if world.size > 1 else ""
        processes = f", sharded over {world.size} processes" if world.sharded else processes
        return (
            f"{data.rows} {rows} to train on, {data.held_rows} held out, longest {data.longest} tokens, "
            f"{trainer.total_steps(config, len(data.train), world.shares)} steps; "
            f"{Path(config.model_name_or_path).name} in {weights} on {place.device}{processes}, "
            f"computing in {dtype_name(place.dtype)}"
        )

    def start(self) -> None:
        """Make the base that training begins with, where that is not the model itself (init_adapter)."""
        if self.given == self.config:
            return
        folder = init_adapter.start_folder(self.given)
        if self.world.first and (self.resumed is None or not (folder / manifest.FILE).is_file()):
            self.folder.mkdir(parents=True, exist_ok=True)
            init_adapter.make_start(self.base, self.given)
        self.world.wait()
        if not (folder / manifest.FILE).is_file():
            raise InputError(
                f"{folder} is not there on {platform.node()}: process 0 made it on another node",
                "give all nodes one output_dir",
            )
        self.base = folder

    def load(self) -> None:
        """Load the base, and put the adapter over it as it begins."""
        config, place = self.config, self.place
        self.start()
        report("loading the model")
        self.model = load_model(
            self.base,
            replace(place, dtype=torch.bfloat16 if config.pure_bf16 else torch.float32)
            if self.full
            else place,
            double_quant=config.double_quantization,
            attention=cuda_graphs.attention_name(config, place, longest=self.data.longest),
            sharded=self.world.sharded,
        )
        self.quantized = quantized_layers(self.model) if place.four_bit or place.eight_bit else []
        if config.grows:
            grow(self.model, self.chat.tokenizer.get_vocab_size(), config.seed)
        self.model = (unfreeze if self.full else add_adapter)(self.model, config)
        if config.adapter_name_or_path:
            init_adapter.load(self.model, config)
        if config.pissa_init:
            self.pissa = _save_pissa(self.model)
        if config.loftq_init and place.four_bit and self.resumed is None:
            share = loftq.begin(self.model, self.base)
            self.console.print(f"the adapter begins with {share:.0%} of the quantisation error")
        if self.world.sharded:
            fsdp.shard(self.model, place.device)

    def build_objective(self) -> None:
        """What is minimised: the loss of the learnt tokens, or of answers against the reference model."""
        config = self.config
        head, how = cuda_graphs.head(
            self.model,
            config,
            self.place,
            passes=self.need.passes,
            sharded=self.world.sharded,
            keep=self.need.kept > 0,
        )
        if how:
            self.console.print(how)
        self.objective = self.head = head
        if config.stage in ("dpo", "kto"):
            self.model.eval()
            logs = {}
            if config.stage == "kto" or config.pref_loss not in ("orpo", "simpo"):
                items = [item for item in (*self.data.train, *self.data.held) if not isinstance(item, Sample)]
                logs = reference(head, items, self.place.device, config.per_device_eval_batch_size)
            self.objective = (Feedback if config.stage == "kto" else Preference)(head, config, logs)

    def kind(self) -> dict[str, Any]:
        """What the speed depends on."""
        dtype = dtype_name(self.place.dtype)
        return time_estimate.kind(self.config, self.place.device, dtype, self.world.size)

    def try_steps(self) -> float:
        """Tokens per second of a few steps on rows of all lengths. Nothing is written.

        Raises UsageError where the base is to be made first.
        """
        if self.given != self.config:
            raise UsageError("--measure needs the base as it is", "train a few steps: max_steps: 5")
        config = replace(self.config, max_steps=time_estimate.TRIED)
        self.data = replace(self.data, train=time_estimate.sample(config, self.data.train), held=[])
        self.load()
        with cuda_graphs.own_stream(self.place):
            self.build_objective()
            return time_estimate.tried(self._loop(config))

    def resume(self) -> None:
        """Make the training loop, and bring it to where the checkpoint was; else remove older checkpoints.

        Raises EdgeError where the checkpoint has done all steps already.
        """
        self.loop = self._loop(self.config)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.resumed is not None:
            done, total = self.resumed.step, self.loop.state.total
            self.best = checkpoint.restore(self.loop, self.resumed)
            if self.world.first:
                checkpoint.set_aside(self.resumed)
            self.console.print(f"resuming from {self.resumed.folder}: {done} of {total} steps are done")
            if done >= total and (self.target / manifest.FILE).is_file():
                raise EdgeError(
                    f"nothing is left to do: {self.resumed.folder} has done {done} of {total} steps",
                    "raise num_train_epochs or max_steps to train on",
                )
        elif self.world.first:
            checkpoint.remove_all(self.folder)
        self.world.wait()

    def _loop(self, config: TrainConfig) -> trainer.Loop:
        """Trains on the rows as `config` says."""
        return trainer.Loop(
            self.model,
            self.data.train,
            config,
            device=self.place.device,
            dtype=self.place.dtype,
            objective=self.objective,
            world=self.world,
        )

    def fit(self) -> None:
        """Train to the end, then take the best weights where that is asked for; write logs and results.

        Raises Stopped after Ctrl-C, once a checkpoint is written.
        """
        evaluate = self.evaluate if self.data.held else None
        with Watch(
            self.loop,
            self.folder,
            self.console,
            self.best,
            evaluate=evaluate,
            save=self.save,
            ask=self.ask,
            accuracy=self.measure if self.config.compute_accuracy else None,
        ) as watch:
            with signals.asked_to_stop(lambda line: self.console.print(line, style="yellow")) as stop:
                try:
                    state = self.loop.run(watch, stop=stop)
                except EdgeError as error:
                    hints = (error.hint, _last_checkpoint(self.folder))
                    raise EdgeError(error.message, "; ".join(filter(None, hints))) from error
            if state.stopped:
                self.stop(watch)
            self.results = {"train_loss": state.loss}
            if watch.best.folder and self.config.keeps_best and watch.best.step != state.step:
                if self.world.first:  # the one that publishes; others may not see its folder
                    checkpoint.load_weights(self.model, Path(watch.best.folder))
                self.console.print(f"the weights are those of step {watch.best.step}, the best evaluation")
                self.results |= {"best_step": watch.best.step, "eval_loss": watch.best.loss}
            elif self.data.held:
                self.results["eval_loss"] = watch.last_evaluation()
            watch.finish(self.results)

    def stop(self, watch: Watch) -> None:
        """Write a checkpoint and raise Stopped, which says how to resume."""
        state = self.loop.state
        saved = watch.save() if state.step else None
        raise Stopped(
            f"stopped at step {state.step} of {state.total}"
            + (f"; {saved} has all that is needed" if saved else ""),
            f"go on with: {self.again}" if saved else "nothing was trained yet",
        )

    def publish(self) -> Path:
        """Write the adapter, or the weights, with all that serving needs; the folder is returned."""
        state = self.loop.state
        if self.world.sharded:
            fsdp.unshard(self.model)
        if self.world.first:
            # What stands there may be replaced: `begin` asked for --overwrite or --resume.
            with manifest.publish(self.target, overwrite=(self.target / manifest.FILE).is_file()) as partial:
                if self.full:
                    _write_weights(self.model, partial, self.base, self.chat)
                else:
                    _write_adapter(self.model, partial, self.pissa)
                chat_format.save(self.chat, partial)
                manifest.write(
                    partial,
                    manifest.Manifest(
                        stage="merged" if self.full else "adapter",
                        name=self.folder.absolute().name,
                        **self.parent(),
                        settings=self.settings(),
                        chat_template=self.chat.digest,
                        stop_ids=self.chat.stop_ids,
                        thinking=self.thinking,
                        versions=manifest.versions(*_PACKAGES),
                    ),
                )
            if not link_files(self.target, self.folder):
                self.console.print(f"note: peft loads {self.target}; this disk has no links", style="yellow")
        self.world.wait()
        self.console.print(
            f"{self.target}: {state.step} steps in {state.seconds:.0f} s, "
            f"{state.tokens_per_second:.0f} tokens/s, last loss {state.loss:.4f}"
        )
        return self.target

    def measure(self) -> float:
        """The share of the held-out rows' learnt tokens that the model finds most probable."""
        return self._mean(Accuracy(self.head))

    def evaluate(self) -> float:
        """The mean loss on the held-out rows."""
        return self._mean(self.objective)

    def _mean(self, objective: Objective) -> float:
        """The mean of `objective` on the held-out rows."""
        return trainer.evaluate(
            self.model,
            self.data.held,
            size=self.config.per_device_eval_batch_size,
            device=self.place.device,
            objective=objective,
            world=self.world,
        )

    def save(self, best: checkpoint.Best) -> Path:
        """Write a checkpoint; its folder is returned."""
        return checkpoint.save(self.loop, self.folder, data=self.digest, base=self.parent(), best=best)

    def ask(self) -> list[tuple[str, str]]:
        """(question, greedy answer) of the first held-out rows."""
        if not self.questions:
            return []
        questions, prompts = zip(*self.questions, strict=True)
        beside = self.config.grows or self.config.additional_target
        half = autocast(self.config, self.place) if beside else None
        device = self.place.device
        with torch.autocast(device, half, enabled=half is not None):
            answers = sample_answers.generate(
                self.model,
                self.chat,
                list(prompts),
                device=device,
                max_new_tokens=_ANSWER_TOKENS,
                size=len(prompts),
                together=self.world.sharded,
            )
        return list(zip(questions, answers, strict=True))

    def parent(self) -> dict[str, Any]:
        """base_model and parents, for the manifest."""
        if (self.base / manifest.FILE).is_file():
            about = manifest.read(self.base)
            parent = about.parent(self.base.absolute())
            return {"base_model": about.base_model or about.name, "parents": [parent]}
        parent = {"stage": "model", "path": str(self.base.absolute()), "digest": ""}
        return {"base_model": self.config.model_name_or_path, "parents": [parent]}

    def settings(self) -> dict[str, Any]:
        """Every key of the configuration, and what came of it, for the manifest."""
        state = self.loop.state
        return {
            **recorded(self.config),
            "alpha": self.config.alpha,
            **self.kind(),
            "quantized": self.quantized,
            "quant_block": NF4_BLOCK,
            "data": self.data.report.numbers(),
            "data_digest": self.digest,
            "steps": state.step,
            "seconds": round(state.seconds, 2),
            "tokens_per_second": round(state.tokens_per_second, 1),
            **self.results,
        }


def _target(config: TrainConfig) -> Path:
    return Path(config.output_dir) / ("merged" if config.whole else "adapter")


def _starting_point(
    config: TrainConfig, overwrite: bool, world: distributed.World
) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume from, None to begin anew. Raises ExistsError where something would be lost."""
    folder = Path(config.output_dir)
    if config.resume_from_checkpoint is not None:
        manifest.check_target(_target(config), True)
        try:
            return checkpoint.find(folder, config.resume_from_checkpoint)
        except InputError as error:
            if world.size == 1:
                raise
            raise InputError(
                f"{error.message} (on {platform.node()})",
                "every node reads the checkpoint: give all one output_dir, or copy it to each",
            ) from error
    manifest.check_target(_target(config), overwrite)
    old = [path for _, path in checkpoint.listed(folder) if (path / manifest.FILE).is_file()]
    if old and not overwrite:
        raise ExistsError(
            f"{old[-1]} is left of a run that did not end",
            "add --resume to go on with it, or --overwrite to begin anew",
        )
    return None


def link_files(stage: Path, run: Path) -> bool:
    """Give the run's own folder the files of `stage`, as hard links, so that peft and transformers load it.

    False where the disk has none. What an earlier run of another kind left there is removed.
    """
    for pattern in ("adapter_*", "model*.safetensors", INDEX, "config.json", "generation_config.json"):
        for path in run.glob(pattern):
            path.unlink()
    try:
        for path in stage.iterdir():
            if path.is_file() and path.name != manifest.FILE:
                (run / path.name).unlink(missing_ok=True)
                os.link(path, run / path.name)
    except OSError:
        return False
    return True


def _last_checkpoint(folder: Path) -> str:
    folders = checkpoint.listed(folder)
    return f"the last whole checkpoint is {folders[-1][1]}" if folders else "no checkpoint was written before"


def _save_pissa(model: Any) -> Path:
    """The adapter as it begins, in a temporary folder: peft subtracts it at the end, for a plain adapter."""
    folder = Path(tempfile.mkdtemp(prefix="edge-pissa-")) / "pissa_init"
    # Saved as what is loaded again, not initialised anew.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _write_adapter(model: Any, folder: Path, pissa: Path | None) -> None:
    how: dict[str, Any] = {}
    if pissa is not None:
        model.peft_config["default"].init_lora_weights = "pissa"
        how["path_initial_model_for_weight_conversion"] = str(pissa)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not "auto": that would ask a hub whether the base's vocabulary was changed.
        model.save_pretrained(folder, save_embedding_layers=False, **how)
    if pissa is not None:
        shutil.rmtree(pissa.parent, ignore_errors=True)
    (folder / "README.md").unlink(missing_ok=True)


def _write_weights(model: Any, folder: Path, base: Path, chat: chat_format.ChatFormat) -> None:
    """All weights in float16, beside the base's own configuration."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.to(torch.float16)).all():
            raise InputError(f"{name} holds NaN, or values beyond float16", "lower learning_rate")
    model.to(torch.float16).save_pretrained(folder)
    config = json_file.read(base / "config.json", required=True)
    key = "dtype" if "dtype" in config or "torch_dtype" not in config else "torch_dtype"
    rows = {"vocab_size": model.config.vocab_size} if "vocab_size" in config else {}
    json_file.write(folder / "config.json", {**config, **rows, key: "float16"})
    chat_format.write_generation_config(base, folder, chat.stop_ids)
