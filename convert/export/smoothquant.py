"""SmoothQuant: the same model with smoothed activations, which eight bits hold better.

onnxruntime's int8 products round their inputs to 8 bits too, by blocks: a column that is a hundred times as
strong as its neighbours takes their bits. What a norm or a gate puts out is divided column by column, and the
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

# How much of a column's strength moves from the activations to the weights. With 0.5 a 135M model was about
# as far off; without rows' first tokens, which are the strongest by far, five times as far.
STRENGTH = 0.65
# A few rows hold the strongest values already.
TOKENS = 2048
# A column that was hardly ever active on these rows may be so in other texts.
LEAST = 0.1
# A layer whose outputs change by more than this share, of any token, is not built as is assumed here.
SAME = 1e-3


def run(source: Path, known: manifest.Manifest | None, target: Path) -> tuple[int, str]:
    """Write the transformers folder `source` to the new folder `target`, smoothed layers in float32.

    Returns how many layers were smoothed, and on which rows. known: source's edge.json.
    Raises InputError where no data set is known, or no layer is built as is needed.
    """
    rows, what = calibration.rows(source, known)
    rows = rows[:: max(1, sum(map(len, rows)) // TOKENS)]
    target.mkdir()
    files: dict[str, str] = {}  # of each tensor
    changed = size = 0
    with contextlib.closing(LayeredModel(source)) as model, torch.inference_mode():
        # Each by itself: nothing is padded, and its first token counts.
        batches = [model.enter([ids])[0] for ids in rows]
        states = [batch.states for batch in batches]
        for number, layer in enumerate(model.layers):
            with model.present(layer):
                states, parameters = _smooth_layer(model, number, batches, states)
                if parameters:
                    tensors = {f"{model.name(layer)}.{name}": value for name, value in parameters.items()}
                    changed, size = changed + 1, size + _save(tensors, target, f"layer-{number}", files)
    if not changed:
        raise InputError(f"{source}: no layer whose activations can be smoothed")
    _copy_rest(source, target, files, size)
    return changed, f"{len(rows)} of {what}"


def _smooth_layer(
    model: LayeredModel, number: int, batches: list[Batch], states: list[torch.Tensor]
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """What leaves a layer that is present, and those of its parameters that were changed."""
    layer = model.layers[number]
    with _observed(layer) as (readers, peaks):
        after = [model.through(number, *pair) for pair in zip(batches, states, strict=True)]
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for norm, names in readers.items():
        peak = torch.stack([peaks[name] for name in names]).amax(0)
        _smooth(layer.get_submodule(norm), [layer.get_submodule(name) for name in names], peak)
    for name, peak in peaks.items():
        parent, _, own = name.rpartition(".")
        up = getattr(layer.get_submodule(parent), "up_proj", None)
        # The gate is multiplied with up_proj's output, which may be divided before.
        if own == "down_proj" and isinstance(up, torch.nn.Linear):
            _smooth(up, [layer.get_submodule(name)], peak)
    off = (model.through(number, batches[0], states[0]) - after[0]).norm(dim=-1) / after[0].norm(dim=-1)
    if not bool((off < SAME).all()):
        return after, {}
    now = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return after, {name: value for name, value in now.items() if not value.equal(before[name])}


def _smooth(source: torch.nn.Module, readers: list[torch.nn.Module], peak: torch.Tensor) -> None:
    """Divide the outputs of `source`, multiply what reads them. peak: (columns,) largest values of either."""
    weights = torch.stack([reader.weight.abs().amax(0) for reader in readers]).amax(0)
    floor = LEAST * peak.median()
    scale = peak.clamp(min=floor) ** STRENGTH / weights.clamp(min=LEAST * weights.median()) ** (1 - STRENGTH)
    for parameter in source.parameters(recurse=False):
        parameter.div_(scale if parameter.dim() == 1 else scale[:, None])
    for reader in readers:
        reader.weight.mul_(scale)


@contextlib.contextmanager
def _observed(layer: torch.nn.Module) -> Iterator[tuple[dict[str, list[str]], dict[str, torch.Tensor]]]:
    """While the block computes: norm -> linear layers that read its output; linear layer -> (columns,) the
    largest absolute values that enter it.
    """
    readers: dict[str, list[str]] = {}
    peaks: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, __, output: outputs.__setitem__(name, output)

    def read(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            values = inputs[0]
            for norm, output in outputs.items():
                if output is values and name not in readers.setdefault(norm, []):
                    readers[norm].append(name)
            peak = values.abs().reshape(-1, values.shape[-1]).amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return hook

    with contextlib.ExitStack() as stack:
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear):
                stack.callback(module.register_forward_pre_hook(read(name)).remove)
            elif "RMSNorm" in type(module).__name__:
                stack.callback(module.register_forward_hook(keep(name)).remove)
        yield readers, peaks


def _save(tensors: dict[str, torch.Tensor], folder: Path, name: str, files: dict[str, str]) -> int:
    """Write the tensors to a file of their own, and note it in `files`; their bytes."""
    save_file(tensors, folder / f"{name}.safetensors")
    files.update(dict.fromkeys(tensors, f"{name}.safetensors"))
    return sum(tensor.nbytes for tensor in tensors.values())


def _copy_rest(source: Path, target: Path, files: dict[str, str], size: int) -> None:
    """The tensors that `files` does not name yet, their index, and the folder's other files.

    size: bytes of the tensors that it names.
    """
    folder = check_folder(source)
    for number, path in enumerate(folder.weights):
        with safe_open(path, framework="pt") as file:
            rest = {name: file.get_tensor(name) for name in file.keys() if name not in files}  # noqa: SIM118
        if rest:
            size += _save(rest, target, f"rest-{number}", files)
    safetensors_io.write_index(target, files, size)
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copyfile(path, target / path.name)
    config = folder.config | {"dtype": "float32"}
    config.pop("torch_dtype", None)
    (target / "config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
