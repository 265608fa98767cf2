"""A model that is too large for memory in float32, computed with one layer of it in memory at a time.

All rows go through one layer before the next is read, so each weight is read once. Of the embeddings only the
rows' own tokens are read, and the head is multiplied with some of its rows at a time, mapped from its file: a
7B model needs one layer in float32, the rows' activations and a few logits.
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

from convert.model import reference
from convert.model.dequantized_base import DequantizedBase, spans
from convert.model.hf_folder import check_folder, loadable
from convert.model.lora_adapter import EMBEDDINGS, HEAD, read_adapter
from convert.model.reference import TorchModel, float32_bytes, instead, padded
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
            states = self._states(rows, last)
            while states:
                count = 1
                while count < len(states) and sum(map(len, states[: count + 1])) <= POSITIONS:
                    count += 1
                part, states = states[:count], states[count:]
                hidden = torch.cat(part)[None]
                # The model's own code does what follows the layers: norm, head, scaling, soft caps.
                with self._replaced(lambda *_, hidden=hidden, **__: hidden):
                    logits = self._call([int(self._used[0])] * hidden.shape[1])
                yield from logits.split([len(row) for row in part])

    def greedy(self, ids: list[int], count: int, ends: frozenset[int]) -> list[int]:
        raise NotImplementedError("every token would read all weights")

    def _states(self, rows: list[list[int]], last: Sequence[int]) -> list[torch.Tensor]:
        """What leaves the last layer at the `last` tokens of each row."""
        batches = self.enter(rows)
        states = [batch.states for batch in batches]
        for number, layer in enumerate(self.layers):
            with self.present(layer):
                for index, batch in enumerate(batches):
                    states[index] = self.through(number, batch, states[index])
        ends = {
            row: hidden[place, len(rows[row]) - last[row] : len(rows[row])]
            for batch, hidden in zip(batches, states, strict=True)
            for place, row in enumerate(batch.rows)
        }
        return [ends[row] for row in range(len(rows))]

    def name(self, layer: torch.nn.Module) -> str:
        """What the parameters of one of `layers` are called in the checkpoint before their own names."""
        return str(self._names[id(layer)])

    def enter(self, rows: list[list[int]]) -> list[Batch]:
        """Rows of token ids, those of like length together, before the first layer."""
        self._use(sorted({token for ids in rows for token in ids}))
        groups: list[list[int]] = [[]]
        for row in sorted(range(len(rows)), key=lambda row: len(rows[row])):
            if groups[-1] and (len(groups[-1]) + 1) * len(rows[row]) > TOKENS:
                groups.append([])
            groups[-1].append(row)
        return [self._enter(group, *padded([rows[row] for row in group])) for group in groups]

    def _enter(self, rows: list[int], ids: torch.Tensor, mask: torch.Tensor, real: torch.Tensor) -> Batch:
        entered: list[torch.Tensor] = []
        calls: list[Called] = []

        def record(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            entered.append(hidden)
            calls.append((arguments, options))
            return hidden

        with self._replaced(record):
            self._decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        return Batch(rows, entered[0], calls, real)

    def through(self, number: int, batch: Batch, states: torch.Tensor) -> torch.Tensor:
        """What layer `number`, which must be present, makes of a batch's states."""
        arguments, options = batch.calls[number]
        with self._observing(batch.real):
            output: torch.Tensor = self.layers[number](states, *arguments, **options)
        return output

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Each layer computes `forward` for the time of the block."""
        with contextlib.ExitStack() as stack:
            for layer in self.layers:
                stack.enter_context(instead(layer, forward))
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
        with loadable(self._folder.path):
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
        if any(name not in self._folder.tensors for name in names):
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
            table, base = self._mapped(self._tables[0])
            values = table[self._used]
            values = (base(self._tables[0], values) if base else values).float()
            _put(self._inner.get_input_embeddings(), "weight", values)
        else:
            # The whole table is in memory; tokens stand for themselves.
            self._used = self._used[:1]

    def _head(self, states: torch.Tensor, name: str, bias: torch.Tensor | None) -> torch.Tensor:
        """The head's output for `states` (1, n, width)."""
        table, base = self._mapped(name)
        rows = base.rows(name, table) if base else lambda start, stop: table[start:stop]
        output = torch.empty(*states.shape[:-1], table.shape[0])
        for start, stop in spans(table.shape):
            part = None if bias is None else bias[start:stop]
            output[..., start:stop] = torch.nn.functional.linear(states, rows(start, stop).float(), part)
        return output

    def _mapped(self, name: str) -> tuple[torch.Tensor, DequantizedBase | None]:
        """The stored tensor, and what dequantises it as in training, or None."""
        if self._held is not None and name in self._held.whole:
            return self._held.read(name), None
        with safe_open(self._folder.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name), self._dequantized

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
        if name == HEAD and name not in self._folder.tensors and self._inner.config.tie_word_embeddings:
            name = EMBEDDINGS
        if name not in self._folder.tensors:
            raise InputError(f"{self._folder.path} has no tensor {name}", "get the model again")
        tensor, base = self._mapped(name)
        return (base(name, tensor) if base else tensor).float()

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
