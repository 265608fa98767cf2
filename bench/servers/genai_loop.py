"""onnxruntime-genai's own loop over an exported folder, as its users write it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge.errors import UnavailableError
from edge.setup import install_command


class Loop:
    """The library and a model on `threads` threads. Raises UnavailableError without the package."""

    def __init__(self, folder: Path, threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise UnavailableError(
                "onnxruntime-genai is not installed", install_command("export-onnx")
            ) from error
        from convert.export.onnx_graph import for_generator

        self.library: Any = onnxruntime_genai
        with tempfile.TemporaryDirectory(prefix="edge-onnx-") as twin:
            for_generator(folder, Path(twin))
            config = onnxruntime_genai.Config(twin)
            options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": options}}))
            self.model = onnxruntime_genai.Model(config)

    def generator(self, prompts: Sequence[Sequence[int]], tokens: int) -> Any:
        """One that has read `prompts`, of equal length, and makes `tokens` greedy tokens after each."""
        count = len(prompts[0]) + tokens
        params = self.library.GeneratorParams(self.model)
        params.set_search_options(
            batch_size=len(prompts), max_length=count, min_length=count, do_sample=False
        )
        generator = self.library.Generator(self.model, params)
        generator.append_tokens(np.array(prompts, np.int32))
        return generator
