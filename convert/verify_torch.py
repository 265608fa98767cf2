"""A transformers folder, or an adapter over its base, computed in float32: the reference of a comparison.

Up to WHOLE bytes of float32 weights the model is loaded as it is. Above, its layers take turns in memory:
all rows go through one layer before the next is read, so that a 7B model needs its embeddings, one layer and
the rows' activations, and each weight is read once for all the rows.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.modeling_outputs import BaseModelOutputWithPast

from convert.folder import Folder, check_folder
from convert.merge_adapter import known_adapter, read_adapter
from convert.seen import Seen
from edge import hardware
from edge.errors import InputError

WHOLE = 2 * 2**30
BATCH = 16
# What peft puts between a module and its weight.
_WRAPPED = re.compile(r"\bbase_layer\.|\boriginal_module\.|\bbase_model\.model\.")

# name of a linear layer (as in the checkpoint, without ".weight"), its input (rows, columns)
Observer = Callable[[str, torch.Tensor], None]


class TorchModel:
    """A causal language model in float32 on the CPU.

    base: the folder of its weights. adapter: a peft adapter that goes on top; then the weights are those
    that its training saw (through 4 bits where it was QLoRA), and the sum is never formed.
    Raises InputError for what transformers cannot load, or a memory that does not suffice.
    """

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        folder = check_folder(base)
        self._folder = folder
        self._adapter = adapter
        self._where = _names(folder)
        self._seen = Seen(known_adapter(adapter).settings) if adapter else None
        size = _float32_bytes(folder)
        self.whole = size <= WHOLE
        need = size if self.whole else _streamed_bytes(folder, size)
        free = hardware.memory().available
        if need * 1.1 > free:
            raise InputError(
                f"{base}: computing it needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free",
                "close what else uses memory",
            )
        self.model = self._build(adapter)
        self.model.eval()
        inner = self.model.get_base_model() if adapter else self.model
        self._inner = inner
        self._decoder = inner.get_decoder()
        self._layers = list(self._decoder.layers)
        self._real: torch.Tensor | None = None  # positions of a padded batch to be observed
        self._layer_names = {id(module): name for name, module in inner.named_modules()}
        if not self.whole:
            self._load_outer()

    def close(self) -> None:
        del self.model, self._inner, self._decoder, self._layers

    def logits(self, rows: list[list[int]]) -> Iterator[torch.Tensor]:
        """The logits of each row of token ids, float32 (tokens, vocabulary), in turn."""
        if not self.whole:
            yield from self._streamed(rows)
            return
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            hidden = self._hidden(part)
            for number, ids in enumerate(part):
                # The model's own code does what follows the decoder: head, scaling, soft caps.
                made = BaseModelOutputWithPast(last_hidden_state=hidden[number : number + 1, : len(ids)])
                with torch.inference_mode(), _instead(self._decoder, lambda *_, m=made, **__: m):
                    yield self._call(ids)

    def _hidden(self, rows: list[list[int]]) -> torch.Tensor:
        """The decoder's states (rows, longest, width) of rows that are padded at their ends."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        real = mask.bool()
        real[:, 0] = False
        self._real = real.flatten()
        try:
            with torch.inference_mode():
                found = self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            self._real = None
        states: torch.Tensor = found.last_hidden_state
        return states

    def greedy(self, ids: list[int], count: int, ends: frozenset[int]) -> list[int] | None:
        """At most `count` most probable next tokens, an end included; None where that would take minutes."""
        if not self.whole:
            return None
        with torch.inference_mode():
            made = self.model.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
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
        return [int(token) for token in made[0, len(ids) :]]

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Within the block `observer` is told the input of every linear layer, but for rows' first tokens."""

        def hook(name: str) -> Callable[..., None]:
            def tell(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
                values = inputs[0].reshape(-1, inputs[0].shape[-1])
                # Rows begin with a token that attention rests on: a thousand times as strong, and no matter.
                observer(name, values[1:] if self._real is None else values[self._real])

            return tell

        handles = [
            module.register_forward_pre_hook(hook(name))
            for name, module in self._inner.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, ids: list[int], **options: Any) -> torch.Tensor:
        found = self.model(input_ids=torch.tensor([ids]), use_cache=False, **options)
        return found.logits[0].float()

    # Building

    def _build(self, adapter: Path | None) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = self._folder.path
        try:
            if self.whole:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
            else:
                from accelerate import init_empty_weights

                config = AutoConfig.from_pretrained(path, local_files_only=True)
                with init_empty_weights(include_buffers=False):
                    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path} cannot be loaded: {first}", "get the model again") from error
        if adapter is None:
            return model
        assert self._seen is not None
        if self.whole:
            for name, parameter in model.named_parameters():
                parameter.data = self._seen(name, parameter.data).float()
        rows = read_adapter(adapter).rows()
        if rows and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        from peft import PeftModel

        with warnings.catch_warnings():
            # peft asks transformers by an old name.
            warnings.simplefilter("ignore", FutureWarning)
            # A table trained apart from its twin is what the merge undoes the tie for.
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings")
            return PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=not self.whole)

    # Layers in turn

    def _load_outer(self) -> None:
        inside = {id(parameter) for layer in self._layers for parameter in layer.parameters()}
        for name, parameter in list(self._inner.named_parameters()):
            if parameter.is_meta and id(parameter) not in inside and self._has(name):
                _put(self._inner, name, self._read(name))
        self._inner.tie_weights()
        for name, parameter in self._inner.named_parameters():
            if parameter.is_meta and id(parameter) not in inside:
                raise InputError(f"{self._folder.path} has no tensor {_plain(name)}", "get the model again")

    def _has(self, name: str) -> bool:
        return ".default" in name or _plain(name) in self._where

    def _read(self, parameter: str) -> torch.Tensor:
        """The value of a parameter of the model, whose name has peft's wrappers in it."""
        if ".default" in parameter:
            return self._read_adapter(parameter)
        name = _plain(parameter)
        path = self._where.get(name)
        if path is None:
            raise InputError(f"{self._folder.path} has no tensor {name}", "get the model again")
        with safe_open(path, framework="pt") as file:
            tensor = file.get_tensor(name)
        return (self._seen(name, tensor) if self._seen else tensor).float()

    def _read_adapter(self, parameter: str) -> torch.Tensor:
        # As peft writes them: without the adapter's name, and a magnitude without ".weight".
        name = "base_model.model." + parameter.replace(".modules_to_save", "").replace(".default", "")
        assert self._adapter is not None
        with safe_open(self._adapter / "adapter_model.safetensors", framework="pt") as file:
            for key in (name, name.removesuffix(".weight")):
                if key in file.keys():  # noqa: SIM118 (no mapping)
                    return file.get_tensor(key).float()
        raise InputError(f"{self._adapter} has no tensor {name}", "train again: edge train")

    def _streamed(self, rows: list[list[int]]) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            states, calls = [], []
            for ids in rows:
                hidden, called = self._record(ids)
                states.append(hidden)
                calls.append(called)
            for number, layer in enumerate(self._layers):
                with self._present(layer):
                    for at, called in enumerate(calls):
                        arguments, options = called[number]
                        states[at] = layer(states[at], *arguments, **options)
            for ids, hidden in zip(rows, states, strict=True):
                with self._replaced(lambda _, h=hidden: lambda *a, **k: h):
                    yield self._call(ids)

    def _record(self, ids: list[int]) -> tuple[torch.Tensor, list[tuple[Any, Any]]]:
        """What enters the first layer for a row, and what every layer is called with beside it."""
        entered: list[torch.Tensor] = []
        called: list[tuple[Any, Any]] = []

        def recorder(_: int) -> Callable[..., torch.Tensor]:
            def forward(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
                entered.append(hidden)
                called.append((arguments, options))
                return hidden

            return forward

        with self._replaced(recorder):
            self._call(ids, logits_to_keep=1)
        return entered[0], called

    @contextlib.contextmanager
    def _replaced(self, make: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self._layers):
                stack.enter_context(_instead(layer, make(number)))
            yield

    @contextlib.contextmanager
    def _present(self, layer: torch.nn.Module) -> Iterator[None]:
        """The layer's weights in memory for the time of the block."""
        prefix = self._layer_names[id(layer)]
        absent = {name: parameter for name, parameter in layer.named_parameters() if parameter.is_meta}
        for name in absent:
            _put(layer, name, self._read(f"{prefix}.{name}"))
        try:
            yield
        finally:
            for name, parameter in absent.items():
                _put(layer, name, parameter)


@contextlib.contextmanager
def _instead(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`module` computes `forward` for the time of the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _plain(name: str) -> str:
    return _WRAPPED.sub("", name)


def _put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    *parents, leaf = name.split(".")
    owner = module.get_submodule(".".join(parents))
    owner._parameters[leaf] = torch.nn.Parameter(value.detach(), requires_grad=False)


def _names(folder: Folder) -> dict[str, Path]:
    """The file that each tensor is in."""
    found = {}
    for path in folder.weights:
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _float32_bytes(folder: Folder) -> int:
    total = 0
    for path in folder.weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(name)
                total += _product(part.get_shape()) * 4
    return total


def _streamed_bytes(folder: Folder, size: int) -> int:
    """Embeddings and head, and two layers: one that goes while the next comes."""
    config = folder.config.get("text_config") or folder.config
    layers = max(1, int(config.get("num_hidden_layers", 1)))
    table = 4 * int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0))
    tables = table if folder.config.get("tie_word_embeddings") else 2 * table
    return tables + 2 * (size - tables) // layers + 2**29


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
