"""A transformers folder, or an adapter over its base, computed in float32: the reference of a comparison.

Up to WHOLE bytes of float32 weights the model is loaded whole; convert.model.layerwise computes larger ones.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPast

from convert.model.dequantized_base import DequantizedBase
from convert.model.hf_folder import Folder, check_folder, loadable
from convert.model.lora_adapter import known_adapter, read_adapter
from edge.errors import InputError
from edge.machine import hardware

WHOLE = 2 * 2**30
BATCH = 16

# name of a linear layer (as in the checkpoint, without ".weight"), its input (rows, columns)
Observer = Callable[[str, torch.Tensor], None]


class TorchModel:
    """A causal language model in float32 on the CPU.

    base: the folder of its weights. adapter: a peft adapter that goes on top, of the dequantised base where
    it was trained as QLoRA; the sum of both is never formed.
    Raises InputError for what transformers cannot load, or a memory that does not suffice.
    """

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        self._folder = check_folder(base)
        self._adapter = adapter
        self._dequantized = DequantizedBase(known_adapter(adapter, base).settings) if adapter else None
        need, memory = self._bytes(), hardware.memory()
        if need * 1.1 > memory.available:
            raise InputError(
                f"{base}: computing it needs {need / 2**30:.1f} GiB, "
                f"{memory.available / 2**30:.1f} GiB are free{memory.within}",
                "close what else uses memory",
            )
        self.model = self._build()
        self.model.eval()
        self._inner = self.model.get_base_model() if adapter else self.model
        self._decoder = self._inner.get_decoder()
        self._real: torch.Tensor | None = None  # positions of a padded batch to be observed

    def close(self) -> None:
        del self.model, self._inner, self._decoder

    def logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[torch.Tensor]:
        """The logits after the `last` tokens of each row of ids, float32 (last, vocabulary), in turn."""
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            hidden = self._hidden(part)
            for number, (ids, count) in enumerate(zip(part, last[start : start + BATCH], strict=True)):
                wanted = hidden[number : number + 1, len(ids) - count : len(ids)]
                # The model's own code does what follows the decoder: head, scaling, soft caps.
                output = BaseModelOutputWithPast(last_hidden_state=wanted)
                with torch.inference_mode(), instead(self._decoder, lambda *_, output=output, **__: output):
                    yield self._call(ids[-count:])

    def _hidden(self, rows: list[list[int]]) -> torch.Tensor:
        """The decoder's states (rows, longest, width) of rows that are padded at their ends."""
        ids, mask, real = padded(rows)
        with torch.inference_mode(), self._observing(real):
            states: torch.Tensor = self._decoder(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
        return states

    @contextlib.contextmanager
    def _observing(self, real: torch.Tensor) -> Iterator[None]:
        """Within the block observers are told of the positions in `real`, a mask over the flat batch."""
        self._real = real
        try:
            yield
        finally:
            self._real = None

    def greedy(self, ids: list[int], count: int, ends: frozenset[int]) -> list[int]:
        """At most `count` most probable next tokens, an end included."""
        return self.greedy_of_all([ids], count, ends)[0]

    def greedy_of_all(self, rows: list[list[int]], count: int, ends: frozenset[int]) -> list[list[int]]:
        """`greedy` of each row, computed side by side: a step reads the weights once for all."""
        ids, mask = (
            pad_sequence([torch.tensor(part) for part in parts], batch_first=True, padding_side="left")
            for parts in (rows, [[1] * len(row) for row in rows])
        )
        with torch.inference_mode():
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                # Of generation_config.json only the ends matter here.
                temperature=None,
                top_p=None,
                top_k=None,
                repetition_penalty=None,
                eos_token_id=sorted(ends),
                pad_token_id=min(ends, default=0),
            )
        made = [row[ids.shape[1] :] for row in tokens.tolist()]
        ended = [next((n for n, token in enumerate(row, 1) if token in ends), len(row)) for row in made]
        return [row[:end] for row, end in zip(made, ended, strict=True)]

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the block `observer` is told the input of every linear layer, but for rows' first tokens."""

        def hook(name: str) -> Callable[..., None]:
            def tell(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                values = inputs[0].reshape(-1, inputs[0].shape[-1])
                if self._real is not None:
                    observer(name, values[self._real])

            return tell

        with contextlib.ExitStack() as stack:
            for name, module in self._inner.named_modules():
                if isinstance(module, torch.nn.Linear):
                    stack.callback(module.register_forward_pre_hook(hook(name)).remove)
            yield

    def linear(self, name: str) -> torch.nn.Linear:
        """The linear layer that an observer is told of as `name`."""
        layer: torch.nn.Linear = self._inner.get_submodule(name)
        return layer

    def _call(self, ids: list[int]) -> torch.Tensor:
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def _bytes(self) -> int:
        return float32_bytes(self._folder)

    def _build(self) -> Any:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = self._folder.path
        with loadable(path):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        if self._dequantized is not None:
            for name, parameter in model.named_parameters():
                parameter.data = self._dequantized(name, parameter.data).float()
        return self._adapted(model, empty=False)

    def _adapted(self, model: Any, *, empty: bool) -> Any:
        """`model` with the adapter beside its weights; empty: its parameters are not read yet."""
        if self._adapter is None:
            return model
        rows = read_adapter(self._adapter).rows()
        if rows and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft asks transformers by an old name.
            warnings.simplefilter("ignore", FutureWarning)
            # A table trained apart from its twin is what the merge undoes the tie for.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")
            return PeftModel.from_pretrained(model, self._adapter, low_cpu_mem_usage=empty)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, attention mask, which positions are to be observed, flat) of rows padded at their ends."""
    sequences = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(sequences, batch_first=True)
    mask = pad_sequence([torch.ones_like(sequence) for sequence in sequences], batch_first=True)
    real = mask.bool()
    # Rows begin with a token that attention rests on: a thousand times as strong, and no matter.
    real[:, 0] = False
    return ids, mask, real.flatten()


@contextlib.contextmanager
def instead(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` for the time of the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def float32_bytes(folder: Folder) -> int:
    """What its weights take in float32."""
    return 4 * sum(math.prod(tensor.shape) for tensor in folder.tensors.values())
