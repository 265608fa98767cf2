"""Options that several commands share: which backend loads a model, and on which device."""

from __future__ import annotations

import argparse

from edge.artefact.find import SUFFIXES

# As edge.backends.onnx_providers has them, which is slow to import.
DEVICES = ("auto", "cpu", "cuda", "dml", "coreml", "openvino")
# The variable with the key of a server that `edge verify` asks.
VERIFY_KEY = "EDGE_VERIFY_API_KEY"
PATH_HELP = "a run, a folder with a model, or a .gguf or .onnx file"


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add --threads, --backend and --device."""
    parser.add_argument("--threads", type=int, help="default: the physical cores it may use")
    parser.add_argument("--backend", choices=list(SUFFIXES), help="default: the faster one here")
    parser.add_argument("--device", choices=DEVICES, default="auto")
