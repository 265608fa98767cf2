"""Opening a file with onnxruntime: paths."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from edge.backends import onnx_providers
from edge.errors import InputError


@pytest.mark.skipif(sys.platform != "linux", reason="only there a locale decides how names are written")
def test_s16_a_folder_whose_name_is_not_written_in_utf8_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "模型"
    folder.mkdir()
    (folder / "a.onnx").write_bytes(b"graph")
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("utf-8"))
    with onnx_providers.utf8_path(folder / "a.onnx") as file:
        assert file == str(folder / "a.onnx")
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("gbk"))
    with onnx_providers.utf8_path(folder / "a.onnx") as file:
        assert file.isascii() and Path(file).read_bytes() == b"graph"
    with (
        pytest.raises(InputError, match="give the file a name in ASCII"),
        onnx_providers.utf8_path(folder / "图"),
    ):
        raise AssertionError
