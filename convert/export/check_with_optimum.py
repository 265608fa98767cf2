"""The ONNX export against another exporter: `edge export onnx RUN --check-with optimum`.

optimum exports the merged model by tracing it, which shares nothing with onnxruntime-genai's builder. Its
pins clash with ours, so it lives in an environment of its own; torch and onnxruntime are taken from this one.
Both exports are in float32, answer the same prompts greedily, and must give the tokens that torch gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from convert.export import onnx
from convert.export.llamacpp_tools import tail
from convert.export.onnx_options import Recipe
from convert.export.source import open_source
from convert.model.hf_folder import place
from convert.verify import probes
from convert.verify.onnx_reader import OnnxReader
from edge.artefact import json_file
from edge.console import plain_table
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


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of PROMPTS greedy answers, how many are torch's: ours, optimum's. difference: of two logits, at most.

    versions: optimum's, and what it brought along.
    """

    ours: int
    optimum: int
    difference: float
    versions: str


def run(run_folder: Path, *, console: Console | None = None) -> Agreement:
    """Export the merged model of the run in both ways, and show how they agree with torch.

    Raises InputError for a run without a merged model or one that does not fit into memory, EdgeError where
    an exporter fails or gives other tokens than torch.
    """
    console = console or Console(highlight=False)
    result = check(run_folder, console)
    headings = ("exporter", "the same greedy tokens", "largest difference of two logits")
    rows = [
        ["onnxruntime-genai (ours)", f"{result.ours} of {PROMPTS}", f"{result.difference:.1e}"],
        [f"optimum ({result.versions})", f"{result.optimum} of {PROMPTS}", ""],
    ]
    title = f"float32 against torch, {PROMPTS} prompts, {TOKENS} tokens each"
    console.print(plain_table(headings, rows, title=title))
    if min(result.ours, result.optimum) < PROMPTS or not result.difference <= MOST_DIFFERENCE:
        raise EdgeError("the exports do not give what torch gives", "do not serve them; report it")
    return result


def check(run_folder: Path, console: Console) -> Agreement:
    """Compare both exporters with torch; as `run`, but for what is shown."""
    # Imported late: torch.
    from convert.model.reference import TorchModel

    source = open_source(run_folder / "merged")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edge-optimum-")))
        status = stack.enter_context(console.status("exporting with onnxruntime-genai's builder"))
        file = onnx.export(source, folder / "onnx", Recipe("fp32"), console=Console(quiet=True))
        reader = stack.enter_context(contextlib.closing(OnnxReader(file)))
        prompts = reader.prompt_ids(probe.messages for probe in probes.fixed()[:PROMPTS])
        status.update("torch answers")
        with contextlib.closing(TorchModel(source.path)) as model:
            wanted = [model.greedy(prompt, TOKENS, reader.stop_ids) for prompt in prompts]
            rows = [(prompt + answer)[:-1] for prompt, answer in zip(prompts, wanted, strict=True)]
            logits = [part.numpy() for part in model.logits(rows, [len(answer) for answer in wanted])]
        status.update("the export answers")
        ours = [reader.greedy(prompt, TOKENS) for prompt in prompts]
        exported = reader.all_logits(rows, [len(answer) for answer in wanted])
        difference = max(float(np.abs(a - b).max()) for a, b in zip(logits, exported, strict=True))
        status.update("optimum exports and answers, in its own environment")
        older_folder(source.path, folder / "merged")
        job = {"source": str(folder / "merged"), "prompts": prompts, "tokens": TOKENS}
        job["ends"] = sorted(reader.stop_ids)
        script = str(Path(__file__).with_name("optimum_child.py"))
        theirs = json.loads(_run([optimum_python(), "-P", script], json.dumps(job)).splitlines()[-1])
    same = [sum(a == b for a, b in zip(side, wanted, strict=True)) for side in (ours, theirs["answers"])]
    return Agreement(same[0], same[1], difference, theirs["versions"])


def optimum_python() -> str:
    """The interpreter of an environment with optimum over this one, made once. Raises EdgeError."""
    here = sysconfig.get_paths()["purelib"]
    key = "\n".join([here, *_PACKAGES])
    folder = hardware.cache_dir() / "optimum" / hashlib.sha256(key.encode("utf-8")).hexdigest()[:16]
    python = str(folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))
    if not (folder / "complete").is_file():
        venv.create(folder, with_pip=True, clear=True)
        _run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", *_PACKAGES])
        own = _run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"])
        # After its own packages: what it lacks (torch, onnx, onnxruntime) is found here.
        (Path(own) / "edge-environment.pth").write_text(here + "\n", encoding="utf-8")
        (folder / "complete").touch()
    return python


def _run(command: list[str], text: str = "") -> str:
    env = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    # What points at this tree's modules would shadow packages of the same name.
    env.pop("PYTHONPATH", None)
    process = subprocess.run(command, input=text.encode("utf-8"), capture_output=True, env=env, check=False)
    if process.returncode != 0:
        raise EdgeError(f"{command[0]} failed:\n{tail(process.stderr.decode('utf-8', 'replace'))}")
    return process.stdout.decode("utf-8", "replace").strip()


def _link(source: str, target: str) -> None:
    place(Path(source), Path(target), link=True)


def older_folder(source: Path, target: Path) -> None:
    """A folder of links to `source` whose config.json transformers 4 reads rightly.

    transformers 5 keeps rope_theta inside rope_parameters, where older ones do not look: they would take
    their default without a word. Raises InputError for a rope that they cannot be told of.
    """
    ignore = shutil.ignore_patterns("config.json")
    shutil.copytree(source.resolve(), target, ignore=ignore, copy_function=_link)
    config = json_file.read(source / "config.json")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type", "default") == "default":
        config["rope_theta"] = rope["rope_theta"]
    elif rope is not None:
        raise InputError(
            f"{source / 'config.json'}: this rope is not known to transformers 4", "nothing to check"
        )
    config["torch_dtype"] = config.get("dtype", "float32")
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
