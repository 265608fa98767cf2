"""The export against another exporter: `python -m convert.export.check_with_optimum RUN` (make onnx-optimum).

optimum exports the merged model by tracing it, which shares nothing with onnxruntime-genai's builder. Its
pins clash with ours, so it lives in an environment of its own; torch and onnxruntime are taken from this one.
Both exports are in float32, answer the same prompts greedily, and must give the tokens that torch gives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from convert.export.llamacpp_tools import tail
from convert.export.onnx import export
from convert.export.source import read_json
from convert.verify.onnx_quality import QUESTIONS, backend_logits
from edge.artefact import manifest
from edge.backends.base import Row
from edge.backends.onnx import Model, Onnx, Settings
from edge.chat_template import ChatTemplate
from edge.console import guarded
from edge.errors import EdgeError, InputError
from edge.machine import hardware

# Nothing of it is used by the project itself. transformers and what it pins come before this environment's.
_PACKAGES = (
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "tokenizers==0.22.2",
    "huggingface-hub==0.36.2",
    "requests==2.34.2",
    "urllib3==2.8.0",
    "charset-normalizer==3.5.3",
    "idna==3.20",
    "certifi==2026.10.19.post1",
)
PROMPTS, TOKENS = 5, 128
# Logits of one and the same float32 model differ by rounding alone.
MOST_DIFFERENCE = 1e-3


def optimum_python() -> Path:
    """The interpreter of an environment with optimum over this one, made once. Raises EdgeError."""
    here = sysconfig.get_paths()["purelib"]
    told = "\n".join([here, *_PACKAGES])
    folder = hardware.cache_dir() / "optimum" / hashlib.sha256(told.encode("utf-8")).hexdigest()[:16]
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run([*pip, *_PACKAGES])
        [own] = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).split(
            "\n"
        )
        # After its own packages: what it lacks (torch, onnx, onnxruntime) is found here.
        (Path(own) / "edge-environment.pth").write_text(here + "\n", encoding="utf-8")
        (folder / "complete").touch()
    return python


def _run(command: list[str], told: str = "") -> str:
    env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    # What points at this tree's modules would shadow packages of the same name.
    env.pop("PYTHONPATH", None)
    done = subprocess.run(command, input=told.encode("utf-8"), capture_output=True, env=env, check=False)
    if done.returncode != 0:
        raise EdgeError(f"{command[0]} failed:\n{tail(done.stderr.decode('utf-8', 'replace'))}")
    return done.stdout.decode("utf-8", "replace").strip()


def older_reader(source: Path, target: Path) -> None:
    """A folder of links to `source` whose config.json transformers 4 reads rightly.

    transformers 5 keeps rope_theta inside rope_parameters, where older ones do not look: they would take
    their default without a word.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.name != "config.json":
            (target / path.name).symlink_to(path.resolve())
    config = read_json(source / "config.json")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") == "default":
        config["rope_theta"] = rope["rope_theta"]
    elif rope is not None:
        raise InputError(
            f"{source / 'config.json'}: this rope is not known to transformers 4", "nothing to check"
        )
    config["torch_dtype"] = config.get("dtype", "float32")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def greedy(backend: Onnx, prompt: list[int], count: int) -> list[int]:
    """The `count` most probable next tokens, whatever they are."""
    backend.truncate(0, 0)
    made: list[int] = []
    tokens, at = prompt, 0
    while len(made) < count:
        logits = backend.step([Row(0, at, tokens, 1)])
        at += len(tokens)
        tokens = [int(logits[0].argmax())]
        made += tokens
    return made


def torch_greedy(merged: Path, prompts: list[list[int]]) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """TOKENS tokens after each prompt by torch in float32, and the logits that chose them."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, local_files_only=True)
    model.generation_config.eos_token_id = None
    made, logits = [], []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            whole = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
            )
            made.append([int(token) for token in whole[0, len(prompt) :]])
            logits.append(model(input_ids=whole).logits[0, len(prompt) - 1 :].float().numpy())
    return made, logits


def check(run: Path, console: Console) -> dict[str, Any]:
    """Compare both exporters with torch. Raises InputError for a run without a merged model."""
    merged = run / "merged"
    origin = manifest.read(merged)
    with tempfile.TemporaryDirectory(prefix="edge-optimum-") as scratch, console.status("") as status:
        folder = Path(scratch)
        status.update("exporting with onnxruntime-genai's builder")
        ours = export(merged, folder / "onnx", precision="fp32", console=Console(quiet=True))
        model = Model(ours)
        backend = Onnx(
            model, Settings(slots=1, context=512, threads=hardware.cpu_threads(), device="cpu", spin=False)
        )
        assert model.template is not None
        form = ChatTemplate(model.template, bos=backend.info.bos_text, eos=backend.info.eos_text)
        prompts = [
            backend.encode(
                form.render([{"role": "user", "content": question}], thinking=origin.thinking), special=True
            )
            for question in QUESTIONS[:PROMPTS]
        ]
        status.update("torch answers")
        want, logits = torch_greedy(merged, prompts)
        status.update("the export answers")
        mine = [greedy(backend, prompt, TOKENS) for prompt in prompts]
        difference = max(
            float(np.abs(backend_logits(backend, prompt + answer, len(prompt) - 1) - wanted).max())
            for prompt, answer, wanted in zip(prompts, want, logits, strict=True)
        )
        backend.close()
        status.update("optimum exports and answers, in its own environment")
        older_reader(merged.resolve(), folder / "merged")
        job = {"source": str(folder / "merged"), "prompts": prompts, "tokens": TOKENS}
        script = str(Path(__file__).with_name("optimum_child.py"))
        answer = _run([str(optimum_python()), "-P", script], json.dumps(job))
        theirs = json.loads(answer.splitlines()[-1])
    same = sum(a == b for a, b in zip(mine, want, strict=True))
    agreed = sum(a == b for a, b in zip(theirs["made"], want, strict=True))
    return {
        "difference": difference,
        "same": same,
        "optimum_same": agreed,
        "prompts": PROMPTS,
        "versions": theirs["versions"],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.export.check_with_optimum", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder, with merged/ in it")
    args = parser.parse_args(argv)
    console = Console(stderr=True)
    found = check(args.run, console)
    table = Table(title=f"float32 against torch, {PROMPTS} prompts of {TOKENS} tokens", title_justify="left")
    for heading in ("exporter", "the same greedy tokens", "largest difference of two logits"):
        table.add_column(heading)
    table.add_row("onnxruntime-genai (ours)", f"{found['same']} of {PROMPTS}", f"{found['difference']:.1e}")
    table.add_row(f"optimum ({found['versions']})", f"{found['optimum_same']} of {PROMPTS}", "")
    Console().print(table)
    if (
        found["same"] < PROMPTS
        or found["optimum_same"] < PROMPTS
        or not found["difference"] <= MOST_DIFFERENCE
    ):
        raise EdgeError("the exports do not give what torch gives", "do not serve them; report it")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
