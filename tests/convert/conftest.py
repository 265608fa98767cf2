"""The converter for toys, and a converted toy that a whole test run shares."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

# The toy's vocabulary has no pre-tokenizer that the converter would know by its hash: it is GPT-2's.
CONVERTER = """
import runpy, sys
from pathlib import Path
folder = Path({folder!r})
sys.path.insert(0, str(folder))
sys.path.insert(1, str(folder / "gguf-py"))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
for name in ("GemmaModel", "Gemma2Model", "Phi3MiniModel"):
    for module in ("gemma", "phi"):
        found = getattr(__import__("conversion." + module, fromlist=["x"]), name, None)
        if found is not None:
            found.set_vocab = lambda self: self._set_vocab_gpt2()
sys.argv[0] = str(folder / {script!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@contextlib.contextmanager
def converting(folder: Path) -> Iterator[None]:
    """llama.cpp's converters take toys; `folder` holds what is put in their place."""
    from convert.export import llamacpp_tools
    from edge.machine import llamacpp_source

    pytest.importorskip("llama_cpp")
    real = llamacpp_source.sdist() / "vendor" / "llama.cpp"
    fake = folder / "sdist" / "vendor" / "llama.cpp"
    fake.mkdir(parents=True)
    for script in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        text = CONVERTER.format(folder=str(real), script=script)
        (fake / script).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llamacpp_tools, "sdist", lambda: folder / "sdist")
        yield


@pytest.fixture
def toy_converter(tmp_path: Path) -> Iterator[None]:
    with converting(tmp_path):
        yield


class _Left(Exception):
    pass


@pytest.fixture(scope="session")
def converted_toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a llama: adapter, merged model, and the unquantised GGUF that an export goes on from.

    Made once; tests copy it, as `shutil.copytree` does, which keeps the times that the GGUF is known by.
    """
    from convert.export import gguf
    from convert.export.source import open_source
    from tests.support.families import make_run
    from tests.support.once import once

    def make(folder: Path) -> None:
        run = make_run(folder, "llama")
        console = Console(file=io.StringIO())
        # As an export that broke off leaves it.
        with (
            converting(folder),
            contextlib.suppress(_Left),
            gguf.converted(open_source(run / "merged"), run / "gguf", console),
        ):
            raise _Left

    return once(tmp_path_factory, "converted toy", make) / "run"


@pytest.fixture
def converted_before(converted_toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The converted toy's run; whatever model is to be converted, its file is what comes out."""
    from convert.export import gguf

    [first] = converted_toy.glob(".gguf-first/*.gguf")
    monkeypatch.setattr(gguf, "convert", lambda origin, target, quant: shutil.copyfile(first, target))
    return converted_toy


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where stages are compared, greedy answers of 8 tokens in place of 24: they take most of a merge."""
    from convert.verify import logits

    monkeypatch.setattr(logits, "GREEDY", 8)
