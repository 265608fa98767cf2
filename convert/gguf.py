"""Merged model -> GGUF: llama.cpp's own converter, then its quantiser, then proof that nothing was lost.

    RUN/merged/ -> RUN/gguf/<name>-<QUANT>.gguf

The converter comes out of the pinned sdist with its matching gguf-py and runs in a process of its own; so
does the quantiser, because native code may abort. Before the folder is published the file is compared with
the merged model: chat template byte for byte, vocabulary, end tokens, and the token ids of probe texts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers import Tokenizer

from edge import hardware, manifest
from edge.errors import EdgeError, InputError, UnavailableError, UsageError
from edge.gguf_header import FILE_TYPES, GGUFHeader, read_header
from edge.sdist import sdist

DEFAULT = "Q4_K_M"
# Types that need no importance matrix, best quality first within a size.
QUANTS = (
    "F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0",
    "Q4_K_M", "Q4_K_S", "IQ4_NL", "IQ4_XS", "Q4_1", "Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
WHOLE = {"F32": "f32", "BF16": "bf16", "F16": "f16"}
TEMPLATE = "chat_template.jinja"

# Texts in which pre-tokenizers, byte fallback and space handling differ.
PROBES = (
    "Hello, world! I'm the conch; WE'LL see, don't you?",
    "请问你是谁？我是海底的神奇海螺，今天（星期三）卖汉堡。",
    "你好👩‍🚀🇨🇳 🍔🐚 café naïve Ǆ ﬁ",
    "def f(x):\n    return x**2  # 平方\n\n\n\tif x >= 10 and y != 'a':\r\n",
    "a  3",
    "2026年11月25日 12345.678 1,000,000 0x1F 3.14e-10 ½ ٣",
    "  leading, trailing  \n \n\n   \t ",
    "日本語テスト한국어עברית العربية ไทย हिन्दी",
    '{"key": [1, 2.5, null], "嵌套": {"a\\n": "b"}}',
    "",
)


def run(
    run_folder: Path, *, quant: str = DEFAULT, overwrite: bool = False, console: Console | None = None
) -> Path:
    """Export `run_folder/merged` to `run_folder/gguf`. Returns the path of the GGUF file.

    Raises UsageError for an unknown quant, InputError for a run without a usable merged model or an artefact
    that differs from it, ExistsError without `overwrite`.
    """
    merged = run_folder / "merged"
    if run_folder.is_dir() and not merged.is_dir():
        raise InputError(f"{run_folder} has no merged model", f"make it: edge merge {run_folder}")
    return export(merged, run_folder / "gguf", quant=quant, overwrite=overwrite, console=console)


def export(
    source: Path,
    target: Path,
    *,
    quant: str = DEFAULT,
    overwrite: bool = False,
    console: Console | None = None,
) -> Path:
    """Export the transformers folder `source` (with edge.json) to the folder `target`; as `run`."""
    console = console or Console(markup=False, highlight=False, soft_wrap=True)
    quant = quant.upper()
    if quant not in QUANTS:
        raise UsageError(f"--quant {quant}: no such type", f"types: {' '.join(QUANTS)}")
    origin = manifest.read(source)
    source, target = source.resolve(), target.absolute()
    template = _template(source, origin)
    config = _json(source / "config.json")
    manifest.check_target(target, overwrite)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if not weights:
        raise InputError(f"{source} has no *.safetensors file", "merge again: edge merge RUN")
    manifest.check_free(target.parent, 2 * weights)
    name = re.sub(r'[\\/:*?"<>|\x00-\x1f]+', "-", origin.name).strip(" .-") or "model"

    with manifest.publish(target, overwrite=overwrite) as partial:
        final = partial / f"{name}-{quant}.gguf"
        # The first file keeps the precision of the weights; 16-bit ones are not converted on the way.
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
        first_type = WHOLE.get(quant) or {"bfloat16": "bf16", "float32": "f32"}.get(dtype, "f16")
        first = final if quant in WHOLE else partial / f"first-{first_type}.gguf"
        with console.status(f"converting {source} with llama.cpp's converter"):
            _convert(source, first, first_type, origin.name)
        fallbacks: list[str] = []
        if first is not final:
            with console.status(f"quantising to {quant}"):
                fallbacks = _quantize(first, final, quant)
            first.unlink()
        with console.status("comparing with the merged model"):
            header = read_header(final)
            verify = _verify(header, source, config, template, origin.stop_ids)
        types = dict(Counter(tensor.type for tensor in header.tensors.values()).most_common())
        manifest.write(
            partial,
            manifest.Manifest(
                stage="gguf",
                name=origin.name,
                base_model=origin.base_model,
                parents=[origin.parent(source)],
                settings={"quant": quant, "file": final.name, "types": types, "fallbacks": len(fallbacks)},
                chat_template=manifest.text_digest(template),
                stop_ids=origin.stop_ids or verify["ends"],
                thinking=origin.thinking,
                verify=verify,
                versions=manifest.versions("edge", "llama-cpp-python", "torch", "transformers", "tokenizers"),
            ),
        )
    result = target / final.name
    size = result.stat().st_size
    console.print(f"{result}: {quant}, {size / 2**20:.0f} MiB ({weights / size:.1f} times smaller)")
    console.print("  " + ", ".join(f"{count} x {kind}" for kind, count in types.items()))
    if fallbacks:
        console.print(
            f"  {len(fallbacks)} of {len(header.tensors)} tensors have rows that {quant} cannot hold "
            f"and took a larger type: {fallbacks[0]}"
        )
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "merge again: edge merge RUN") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a JSON object", "merge again: edge merge RUN")
    return data


def _template(source: Path, origin: manifest.Manifest) -> str:
    """The chat template, exactly. A model without one would be served as gibberish: refused."""
    path = source / TEMPLATE
    if not path.is_file():
        raise InputError(
            f"{source} has no {TEMPLATE}: the exported model would not know how a turn begins and ends",
            f"copy {TEMPLATE} from the base model into it, or merge again: edge merge RUN --overwrite",
        )
    text = path.read_text(encoding="utf-8")
    # As transformers reads it: line ends of Windows count as plain ones. The digest may be of either form.
    digests = {manifest.text_digest(text), manifest.file_digest(path)}
    if origin.chat_template is not None and origin.chat_template not in digests:
        raise InputError(
            f"{path} is not the template that edge.json names: it was changed after the merge",
            "merge again: edge merge RUN --overwrite",
        )
    return text


def _convert(source: Path, target: Path, outtype: str, name: str) -> None:
    script = sdist() / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(source), "--outfile", str(target)]
    command += ["--outtype", outtype, "--model-name", name]
    env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("NO_LOCAL_GGUF", None)
    done = subprocess.run(command, capture_output=True, env=env, cwd=target.parent, check=False)
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode == 0 and target.is_file():
        return
    if "BPE pre-tokenizer was not recognized" in log:
        raise InputError(
            f"llama.cpp does not know the pre-tokenizer of {source / 'tokenizer.json'}",
            "use the base model's own tokenizer files, unchanged: with a guess the tokens would be wrong",
        )
    if unknown := re.search(r"Model (\S+) is not supported", log):
        raise InputError(
            f"llama.cpp's converter does not know the architecture {unknown[1]}", "use another base"
        )
    if missing := re.search(r"No module named '([\w.]+)'", log):
        raise UnavailableError(
            f"llama.cpp's converter needs the package '{missing[1]}', which is not installed",
            "pip install -c constraints.txt -e '.[train]'",
        )
    raise EdgeError(f"llama.cpp's converter failed on {source}:\n{_tail(log)}", "its last lines are above")


def _tail(log: str, lines: int = 12) -> str:
    return "\n".join(line[:200] for line in log.replace("\r", "\n").strip().splitlines()[-lines:])


def _native(mode: str, job: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """Run gguf_native.py; its answer and log. Raises EdgeError where it dies or refuses."""
    script = str(Path(__file__).with_name("gguf_native.py"))
    job = job | {"threads": hardware.cpu_threads()}
    done = subprocess.run(
        [sys.executable, "-P", script, mode],
        input=json.dumps(job).encode("utf-8"),
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "1"},
        check=False,
    )
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode != 0:
        raise EdgeError(
            f"llama.cpp could not {mode} {path.name} (exit code {done.returncode}):\n{_tail(log)}",
            "if it is not installed or does not load: python -m edge.native",
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer, log


def _quantize(source: Path, target: Path, quant: str) -> list[str]:
    """Quantise; returns a line for each tensor that took another type than the recipe's."""
    ftype = next(number for number, name in FILE_TYPES.items() if name == quant)
    answer, log = _native("quantize", {"source": str(source), "target": str(target), "ftype": ftype}, target)
    if answer["code"] != 0:
        raise EdgeError(f"llama.cpp could not quantise to {quant}:\n{_tail(log)}", "try another --quant")
    found = re.findall(r"ncols\s+(\d+) not divisible by\s+(\d+).*?-> falling back to\s+(\S+)", log)
    return [f"rows of {columns} are no multiple of {block}, so {kind}" for columns, block, kind in found]


def _verify(
    header: GGUFHeader, source: Path, config: dict[str, Any], template: str, stop_ids: list[int]
) -> dict[str, Any]:
    """Compare the file with the folder it was made from. Raises InputError that names the difference.

    Returns what was compared; `ends` are the tokens at which llama.cpp itself would stop.
    """
    path = header.path
    again = "the file was not published; this model needs a tokenizer or converter that agree"
    if header.chat_template != template:
        raise InputError(f"{path.name}: the chat template differs from {source / TEMPLATE}", again)
    text_config = config.get("text_config") or config
    tied = bool(config.get("tie_word_embeddings", text_config.get("tie_word_embeddings", False)))
    if ("output.weight" in header.tensors) == tied:
        state = "has" if tied else "lacks"
        raise InputError(
            f"{path.name} {state} output.weight, config.json says tie_word_embeddings={tied}", again
        )
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    added = [str(token) for token in tokenizer.get_added_tokens_decoder().values()]
    prompts = [*PROBES, *(f"a {token}b\n{token} 你" for token in _spread(added, 24)), template]
    answer, _ = _native("inspect", {"path": str(path), "prompts": prompts}, path)
    vocab = int(text_config.get("vocab_size", 0))
    if not answer["vocab_size"] == header.vocab_size == vocab:
        raise InputError(f"{path.name} has {answer['vocab_size']} tokens, config.json says {vocab}", again)
    # Without the tokens that a tokenizer may add around a text: the chat template writes those.
    for prompt, ids in zip(prompts, answer["ids"], strict=True):
        expected = tokenizer.encode(prompt, add_special_tokens=False).ids
        if ids != expected:
            raise InputError(
                f"{path.name}: the prompt {prompt[:60]!r} has the token ids {ids[:12]} in llama.cpp, "
                f"{expected[:12]} in the tokenizer",
                again,
            )
    if stop_ids and answer["eos"] not in stop_ids:
        raise InputError(
            f"{path.name} ends with token {answer['eos']}, the merged model with {stop_ids}", again
        )
    return {
        "chat_template": "equal",
        "vocab_size": vocab,
        "tied": tied,
        "probe_texts": len(prompts),
        "token_ids": "equal",
        "ends": answer["ends"],
    }


def _spread(items: list[str], count: int) -> list[str]:
    """At most `count` of `items`, evenly spread, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]
