"""A merged model with the same outputs whose activations are evener, so that eight bits hold them better.

onnxruntime's int8 products round what enters them to 8 bits too, by blocks: a column that is a hundred times
as strong as its neighbours takes their bits. What a norm or a gate gives is divided column by column, and the
weights that read it are multiplied by as much (Xiao et al. 2022, https://arxiv.org/abs/2211.10438).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from convert.export import calibration
from convert.model import safetensors_io
from convert.model.hf_folder import INDEX, check_folder
from convert.model.layerwise import Batch, LayeredModel
from edge.artefact import manifest
from edge.errors import InputError

# How much of a column's strength goes from the activations to the weights. With 0.5 a 135M model was about
# as far off; without what begins a row, which is the strongest by far, five times as far.
STRENGTH = 0.65
# Strongest values are those of a few rows already.
TOKENS = 2048
# A column that was hardly ever seen active may be so in other texts.
LEAST = 0.1
# A layer whose outputs change by more than this share, of any token, is built otherwise than is taken here.
SAME = 1e-3


def run(source: Path, known: manifest.Manifest | None, target: Path) -> tuple[int, str]:
    """Write the transformers folder `source` to the new folder `target`, in float32 where it was changed.

    Returns how many layers were, and what their activations were seen on. known: source's edge.json.
    Raises InputError where no data set is known, or no layer is built as is needed.
    """
    rows, what = calibration.rows(source, known)
    rows = rows[:: max(1, sum(map(len, rows)) // TOKENS)]
    target.mkdir()
    where: dict[str, str] = {}
    changed = size = 0
    model = LayeredModel(source)
    try:
        with torch.inference_mode():
            # Each by itself: nothing is padded, and its first token is seen.
            batches = [model.enter([ids])[0] for ids in rows]
            states = [batch.states for batch in batches]
            for number, layer in enumerate(model.layers):
                with model.present(layer):
                    states, found = _layer(model, number, batches, states)
                    tensors = {f"{model.name(layer)}.{name}": value for name, value in found.items()}
                    if tensors:
                        changed, size = changed + 1, size + _bytes(tensors)
                        save_file(tensors, target / f"layer-{number}.safetensors")
                        where |= dict.fromkeys(tensors, f"layer-{number}.safetensors")
    finally:
        model.close()
    if not changed:
        raise InputError(f"{source}: no layer whose activations can be evened out")
    _rest(source, target, where, size)
    return changed, f"{len(rows)} of {what}"


def _layer(
    model: LayeredModel, number: int, batches: list[Batch], states: list[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What leaves a layer that is present, and those of its parameters that are another now."""
    layer = model.layers[number]
    with _observed(layer) as (readers, peaks):
        after = [
            model.through(number, batch, entering) for batch, entering in zip(batches, states, strict=True)
        ]
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for name, read in readers.items():
        peak = torch.stack([peaks[one] for one in read]).amax(0)
        _even(layer.get_submodule(name), [layer.get_submodule(one) for one in read], peak)
    # The gate is multiplied with what comes up: that may be divided before.
    for name, peak in peaks.items():
        parent, _, own = name.rpartition(".")
        up = getattr(layer.get_submodule(parent), "up_proj", None)
        if own == "down_proj" and isinstance(up, torch.nn.Linear):
            _even(up, [layer.get_submodule(name)], peak)
    if _far(model.through(number, batches[0], states[0]), after[0]):
        for name, parameter in layer.named_parameters():
            parameter.copy_(before[name])
    now = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return after, {name: value for name, value in now.items() if not value.equal(before[name])}


def _far(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether any token's state changed."""
    off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return not bool((off < SAME).all())


def _even(giver: torch.nn.Module, readers: list[torch.nn.Module], peak: torch.Tensor) -> None:
    """Divide what `giver` gives and multiply the columns that read it. peak: its largest value by column."""
    weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
    floor = LEAST * peak.median()
    scale = peak.clamp(min=floor) ** STRENGTH / weights.clamp(min=LEAST * weights.median()) ** (1 - STRENGTH)
    for parameter in giver.parameters(recurse=False):
        parameter.div_(scale if parameter.dim() == 1 else scale[:, None])
    for reader in readers:
        reader.weight.mul_(scale)


@contextlib.contextmanager
def _observed(layer: torch.nn.Module) -> Iterator[tuple[dict[str, list[str]], dict[str, torch.Tensor]]]:
    """While the block computes: norm -> linear layers that read what it gives; linear layer -> the largest
    absolute value of each column that enters it.
    """
    readers: dict[str, list[str]] = {}
    peaks: dict[str, torch.Tensor] = {}
    given: dict[str, torch.Tensor] = {}

    def gives(name: str) -> Callable[..., None]:
        return lambda _, __, output: given.__setitem__(name, output)

    def reads(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0]
            for norm, output in given.items():
                if output is values and name not in readers.setdefault(norm, []):
                    readers[norm].append(name)
            peak = values.abs().reshape(-1, values.shape[-1]).amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return hook

    handles = []
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(reads(name)))
        elif "RMSNorm" in type(module).__name__:
            handles.append(module.register_forward_hook(gives(name)))
    try:
        yield readers, peaks
    finally:
        for handle in handles:
            handle.remove()


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _rest(source: Path, target: Path, where: dict[str, str], size: int) -> None:
    """What `where`, a tensor's file by its name, does not hold yet; and the folder's other files.

    size: bytes of the tensors that it holds.
    """
    folder = check_folder(source)
    for number, path in enumerate(folder.weights):
        with safe_open(path, framework="pt") as file:
            rest = {name: file.get_tensor(name) for name in file.keys() if name not in where}  # noqa: SIM118
        if rest:
            save_file(rest, target / f"rest-{number}.safetensors")
            where |= dict.fromkeys(rest, f"rest-{number}.safetensors")
            size += _bytes(rest)
    safetensors_io.write_index(target, where, size)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, target / path.name)
    config = dict(folder.config) | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
