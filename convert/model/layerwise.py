"""A model that is too large for memory in float32, computed with a layer of it at a time.

All rows go through one layer before the next is read, so each weight is read once. Of the embeddings only
the rows' own tokens are read, and the head is multiplied with some of its rows at a time, as they lie in the
file: a 7B model needs one layer in float32, the rows' activations and a few logits.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert.model import reference, safetensors_io
from convert.model.dequantized_base import Seen, spans
from convert.model.hf_folder import check_folder
from convert.model.lora_adapter import EMBEDDINGS, HEAD, read_adapter
from convert.model.reference import TorchModel, float32_bytes, instead, named, padded
from edge.errors import InputError

# Tokens that go through a layer at once, and positions whose logits are made at once.
TOKENS, POSITIONS = 2048, 256
# What peft puts between a module and its weight.
_WRAPPED = re.compile(r"\btoken_adapter\.|\bbase_layer\.|\boriginal_module\.|\bbase_model\.model\.")

# What a layer is called with beside its states: positional arguments, options.
Called = tuple[tuple[Any, ...], dict[str, Any]]


def is_large(base: Path) -> bool:
    """Whether the model in the folder `base` is to be computed in layers."""
    return float32_bytes(check_folder(base)) > reference.WHOLE


def load(base: Path, adapter: Path | None = None) -> TorchModel:
    """The model, whole or in layers by its size. Raises InputError as TorchModel."""
    return (LayeredModel if is_large(base) else TorchModel)(base, adapter)


@dataclass(frozen=True)
class Batch:
    """Rows on their way through the layers.

    rows: their numbers. states: what enters the first layer, (rows, longest, width). calls: what each layer
    is called with beside its states. real: (rows * longest,), which positions are to be observed.
    """

    rows: list[int]
    states: torch.Tensor
    calls: list[Called]
    real: torch.Tensor


class LayeredModel(TorchModel):
    """As TorchModel; writes no texts."""

    def __init__(self, base: Path, adapter: Path | None = None) -> None:
        super().__init__(base, adapter)
        self.layers = list(self._decoder.layers)
        self._names = {id(module): name for name, module in self._inner.named_modules()}
        self._used = torch.zeros(0, dtype=torch.long)
        self._tables = self._plain_tables()
        self._load_outer()

    def close(self) -> None:
        super().close()
        del self.layers, self._tables

    def logits(self, rows: list[list[int]], last: Sequence[int]) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            wanted = self._states(rows, last)
            at = 0
            while at < len(rows):
                stop = at + 1
                while stop < len(rows) and sum(last[at : stop + 1]) <= POSITIONS:
                    stop += 1
                hidden = torch.cat(wanted[at:stop])[None]
                # The model's own code does what follows the layers: norm, head, scaling, soft caps.
                with self._replaced(lambda _, h=hidden: lambda *a, **k: h):
                    found = self._call([int(self._used[0])] * hidden.shape[1])
                yield from found.split(list(last[at:stop]))
                at = stop

    def greedy(self, ids: list[int], count: int, ends: frozenset[int]) -> list[int]:
        raise NotImplementedError("every token would read all weights")

    def _states(self, rows: list[list[int]], last: Sequence[int]) -> list[torch.Tensor]:
        """What leaves the last layer at the `last` tokens of each row."""
        batches = self.enter(rows)
        states = [batch.states for batch in batches]
        for number, layer in enumerate(self.layers):
            with self.present(layer):
                for at, batch in enumerate(batches):
                    states[at] = self.through(number, batch, states[at])
        found = [torch.empty(0)] * len(rows)
        for batch, hidden in zip(batches, states, strict=True):
            for number, at in enumerate(batch.rows):
                found[at] = hidden[number, len(rows[at]) - last[at] : len(rows[at])]
        return found

    def name(self, layer: torch.nn.Module) -> str:
        """What the parameters of one of `layers` are called in the checkpoint before their own names."""
        return self._names[id(layer)]

    def enter(self, rows: list[list[int]]) -> list[Batch]:
        """Rows of token ids, those of like length together, before the first layer."""
        self._use(sorted({token for ids in rows for token in ids}))
        parts: list[list[int]] = [[]]
        for at in sorted(range(len(rows)), key=lambda at: len(rows[at])):
            if parts[-1] and (len(parts[-1]) + 1) * len(rows[at]) > TOKENS:
                parts.append([])
            parts[-1].append(at)
        made = []
        for part in parts:
            ids, mask, real = padded([rows[at] for at in part])
            made.append(Batch(part, *self._record(ids, mask), real))
        return made

    def through(self, number: int, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """What layer `number`, which must be present, makes of a batch's states."""
        arguments, options = batch.calls[number]
        self._real = batch.real
        try:
            found: torch.Tensor = self.layers[number](states, *arguments, **options)
        finally:
            self._real = None
        return found

    def _record(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[Called]]:
        """What enters the first layer, and what every layer is called with beside it."""
        entered: list[torch.Tensor] = []
        called: list[Called] = []

        def recorder(_: int) -> Callable[..., torch.Tensor]:
            def forward(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
                entered.append(hidden)
                called.append((arguments, options))
                return hidden

            return forward

        with self._replaced(recorder):
            self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return entered[0], called

    @contextlib.contextmanager
    def _replaced(self, make: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(instead(layer, make(number)))
            yield

    # Weights

    def _bytes(self) -> int:
        """Two layers, one that goes while the next comes, activations, and tables that an adapter changes."""
        config = self._folder.config.get("text_config") or self._folder.config
        layers = max(1, int(config.get("num_hidden_layers", 1)))
        table = 4 * int(config.get("vocab_size", 0)) * int(config.get("hidden_size", 0))
        tables = table if self._folder.config.get("tie_word_embeddings") else 2 * table
        return 2 * (float32_bytes(self._folder) - tables) // layers + 2**30

    def _build(self) -> Any:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self._held = read_adapter(self._adapter) if self._adapter else None
        self._where = safetensors_io.files(self._folder.weights)
        with named(self._folder.path):
            config = AutoConfig.from_pretrained(self._folder.path, local_files_only=True)
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        try:
            return self._adapted(model, empty=True)
        except NotImplementedError as error:
            # peft copies what it puts around tables with added tokens.
            raise InputError(
                f"{self._adapter} can only be computed over a model that is in memory as a whole"
            ) from error

    def _plain_tables(self) -> list[str]:
        """Names of embeddings and head, as they lie in files; none where an adapter changes one of them."""
        embeddings, head = self._inner.get_input_embeddings(), self._inner.get_output_embeddings()
        if not isinstance(embeddings, torch.nn.Embedding) or type(head) is not torch.nn.Linear:
            return []
        names = [f"{self._names[id(module)]}.weight" for module in (embeddings, head)]
        if self._inner.config.tie_word_embeddings:
            names[1] = names[0]
        if any(name not in self._where for name in names):
            return []
        # It names a row of the whole table, and matters to gradients alone.
        embeddings.padding_idx = None
        embeddings.register_forward_pre_hook(lambda _, ids: (torch.searchsorted(self._used, ids[0]),))
        head.forward = lambda states: self._head(states, names[1], head.bias)
        return names

    def _use(self, tokens: list[int]) -> None:
        """Read the embeddings of `tokens`, the only ones that will be asked for."""
        self._used = torch.tensor(tokens)
        if self._tables:
            table, seen = self._mapped(self._tables[0])
            values = table[self._used]
            values = (seen(self._tables[0], values) if seen else values).float()
            _put(self._inner.get_input_embeddings(), "weight", values)
        else:
            # The whole table is in memory; tokens stand for themselves.
            self._used = self._used[:1]

    def _head(self, states: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        """The head's output for `states` (1, n, width)."""
        table, seen = self._mapped(name)
        rows = seen.rows(name, table) if seen else lambda start, stop: table[start:stop]
        found = torch.empty(*states.shape[:-1], table.shape[0])
        for start, stop in spans(table.shape):
            part = None if bias is None else bias[start:stop]
            found[..., start:stop] = torch.nn.functional.linear(states, rows(start, stop).float(), part)
        return found

    def _mapped(self, name: str) -> tuple[torch.Tensor, Seen | None]:
        """A tensor as it lies in its file, and what training saw it through."""
        if self._held is not None and name in self._held.whole:
            return self._held.read(name), None
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name), self._seen

    def _load_outer(self) -> None:
        """Read what is outside of the layers, but for the tables that are read where they lie."""
        inside = {id(parameter) for layer in self.layers for parameter in layer.parameters()}
        if self._tables:
            inside |= {id(self._inner.get_input_embeddings().weight)}
            inside |= {id(self._inner.get_output_embeddings().weight)}
        for name, parameter in list(self._inner.named_parameters()):
            # What an adapter holds whole stands beside its original, which nobody asks.
            if parameter.is_meta and id(parameter) not in inside and ".original_module." not in name:
                _put(self._inner, name, self._read(name))

    def _read(self, parameter: str) -> torch.Tensor:
        """The value of a parameter of the model, whose name has peft's wrappers in it."""
        if ".default" in parameter:
            return self._read_adapter(parameter)
        name = _WRAPPED.sub("", parameter)
        if name == HEAD and name not in self._where and self._inner.config.tie_word_embeddings:
            name = EMBEDDINGS
        if name not in self._where:
            raise InputError(f"{self._folder.path} has no tensor {name}", "get the model again")
        tensor, seen = self._mapped(name)
        return (seen(name, tensor) if seen else tensor).float()

    def _read_adapter(self, parameter: str) -> torch.Tensor:
        # As peft writes them: without the adapter's name, and a magnitude without ".weight".
        name = "base_model.model." + parameter.replace(".modules_to_save", "").replace(".default", "")
        assert self._adapter is not None
        with safe_open(self._adapter / "adapter_model.safetensors", framework="pt") as file:
            for key in (name, name.removesuffix(".weight")):
                if key in file.keys():  # noqa: SIM118 (no mapping)
                    return file.get_tensor(key).float()
        raise InputError(f"{self._adapter} has no tensor {name}", "train again: edge train")

    @contextlib.contextmanager
    def present(self, layer: torch.nn.Module) -> Iterator[None]:
        """The layer's weights in memory for the time of the block."""
        prefix = self.name(layer)
        absent = {name: parameter for name, parameter in layer.named_parameters() if parameter.is_meta}
        for name in absent:
            _put(layer, name, self._read(f"{prefix}.{name}"))
        try:
            yield
        finally:
            for name, parameter in absent.items():
                _put(layer, name, parameter)


def _put(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    *parents, leaf = name.split(".")
    owner = module.get_submodule(".".join(parents))
    owner._parameters[leaf] = torch.nn.Parameter(value.detach(), requires_grad=False)
