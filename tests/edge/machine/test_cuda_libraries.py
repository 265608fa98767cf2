"""Which CUDA library is missing, by what a loader says."""

from __future__ import annotations

import pytest

from edge.machine import hardware
from edge.machine.cuda_libraries import MissingLibrary, missing_library

GPU = hardware.GPU(0, "RTX 4060", 8 * 2**30, 7 * 2**30, "581.01", "8.9", "13.1")


@pytest.mark.parametrize(
    ("error", "library"),
    [
        (
            "OSError: libcudart.so.12: cannot open shared object file: No such file or directory",
            MissingLibrary("libcudart.so.12", "12", "nvidia-cuda-runtime-cu12"),
        ),
        ("libcublasLt.so.13: cannot open", MissingLibrary("libcublasLt.so.13", "13", "nvidia-cublas")),
        ("libcudnn.so.9: cannot open", MissingLibrary("libcudnn.so.9", "13", "nvidia-cudnn-cu13")),
        ("libcufft.so.11: cannot open", MissingLibrary("libcufft.so.11", "12", "nvidia-cufft-cu12")),
        (
            'depends on "cublas64_12.dll" which is',
            MissingLibrary("cublas64_12.dll", "12", "nvidia-cublas-cu12"),
        ),
        ("libstdc++.so.6: version `GLIBCXX_3.4.30' not found", None),
        ("something else", None),
    ],
)
def test_s11_the_missing_library_is_named(error: str, library: MissingLibrary | None) -> None:
    assert missing_library(error, [GPU]) == library


def test_a_major_that_nothing_tells_is_left_out() -> None:
    library = missing_library("libcudnn.so.9: cannot open", [])
    assert library == MissingLibrary("libcudnn.so.9", "", "nvidia-cudnn")
    assert library.install.endswith("-m pip install nvidia-cudnn  (CUDA major unknown)")
