"""What the builder's graph lacks: an input for the positions whose logits are wanted, outputs for the last
hidden states and for a few candidates, and the cache's width.

Without the input a prompt's logits are computed for each of its tokens, a fifth of a megabyte each. Its
default is the last position: who does not know the input gets the next token's logits. Outputs that nobody
binds cost nothing but the candidates' TopK.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from convert.model.hf_folder import place
from edge.artefact.onnx_header import CANDIDATES, HIDDEN

_GROUPS = 64
_HEADS = ("MatMul", "MatMulNBits", "Gemm")


def complete(path: Path, name: str, head_size: int, *, width: int, candidates: int = 0) -> None:
    """Let the graph at `path` compute logits of the positions in the new input `name` [outputs] alone.

    Its logits are then [batch, outputs, vocabulary], and an output has the states that they are computed from
    [batch, length, width]. candidates: with so many of the largest logits, and their ids, as outputs [batch,
    outputs, candidates]. Caches get the last dimension `head_size`, which the builder leaves open. Weights
    beside the file are not touched.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    node = producers["logits"]
    after = set(node.output)
    while node.op_type not in _HEADS:
        node = producers[node.input[0]]
        after.update(node.output)
    picked = f"{name}_{HIDDEN}"
    _rename(graph, node.input[0], HIDDEN)
    gather = helper.make_node("Gather", [HIDDEN, name], [picked], name=f"/{name}/Gather", axis=1)
    node.input[0] = picked
    graph.node.insert(list(graph.node).index(node), gather)
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["outputs"]))
    graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), name))
    # Shapes that were noted for what now has fewer positions.
    _forget_shapes(graph, after)
    logits = _set_dimension(graph, "logits", 1, dim_param="outputs")
    graph.output.append(helper.make_tensor_value_info(HIDDEN, logits.elem_type, ["batch", "length", width]))
    if candidates:
        add_candidates(graph, candidates)
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            _set_dimension(graph, value.name, 3, dim_value=head_size)
    onnx.save_model(model, path)


def add_candidates(graph: onnx.GraphProto, count: int) -> None:
    """Outputs for the `count` largest logits, the largest first and equal ones by id, and for their ids.

    A GPU's TopK gives a row to one of its many processors: a long row is cut into groups, and the largest
    of the groups' largest are taken.
    """
    [logits] = [output for output in graph.output if output.name == "logits"]
    tensor = logits.type.tensor_type
    vocabulary = tensor.shape.dim[2].dim_value
    count = min(count, vocabulary)
    values, ids = CANDIDATES

    def constant(name: str, array: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(array, f"candidate_{name}"))
        return f"candidate_{name}"

    def shape(name: str, *lengths: int) -> str:
        return constant(name, np.array(lengths, np.int64))

    def node(kind: str, inputs: list[str], *outputs: str, **attributes: int) -> None:
        name = f"/candidates/{outputs[0]}"
        graph.node.append(helper.make_node(kind, inputs, list(outputs), name=name, **attributes))

    wanted = shape("count", count)
    each = -(-vocabulary // _GROUPS)
    if each < 4 * count:
        node("TopK", ["logits", wanted], values, ids)
    else:
        source = "logits"
        if missing := each * _GROUPS - vocabulary:
            source, dtype = "candidate_padded", helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            pads = shape("pads", 0, 0, 0, 0, 0, missing)
            node("Pad", ["logits", pads, constant("none", np.array(-np.inf, dtype))], source)
        node("Reshape", [source, shape("groups", 0, 0, _GROUPS, each)], "candidate_grouped")
        node("TopK", ["candidate_grouped", wanted], "candidate_best", "candidate_places")
        starts = constant("starts", np.arange(_GROUPS, dtype=np.int64)[:, None] * each)
        node("Add", ["candidate_places", starts], "candidate_whole_places")
        flat = shape("flat_shape", 0, 0, _GROUPS * count)
        node("Reshape", ["candidate_best", flat], "candidate_flat")
        node("Reshape", ["candidate_whole_places", flat], "candidate_flat_places")
        node("TopK", ["candidate_flat", wanted], values, "candidate_among")
        node("GatherElements", ["candidate_flat_places", "candidate_among"], ids, axis=2)
    for name, kind in zip(CANDIDATES, (tensor.elem_type, TensorProto.INT64), strict=True):
        graph.output.append(helper.make_tensor_value_info(name, kind, ["batch", "outputs", count]))


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    _forget_shapes(graph, {old})


def _forget_shapes(graph: onnx.GraphProto, names: set[str]) -> None:
    for info in [info for info in graph.value_info if info.name in names]:
        graph.value_info.remove(info)


def _set_dimension(graph: onnx.GraphProto, name: str, axis: int, **value: Any) -> Any:
    """Give one dimension of an input or output another length or name; its type."""
    [tensor] = [info.type.tensor_type for info in (*graph.input, *graph.output) if info.name == name]
    tensor.shape.dim[axis].CopyFrom(onnx.TensorShapeProto.Dimension(**value))
    return tensor


def for_generator(folder: Path, target: Path) -> None:
    """An exported folder as onnxruntime-genai's own Generator loads it: the same weights, linked where the
    disk can.

    It must read in the graph that it gets the logits of one position, and allots that many.
    """
    for path in folder.iterdir():
        if path.suffix != ".onnx":
            # onnxruntime follows no symbolic link out of the folder.
            place(path, target / path.name, link=True)
            continue
        model = onnx.load(path, load_external_data=False)
        _set_dimension(model.graph, "logits", 1, dim_value=1)
        onnx.save_model(model, target / path.name)
