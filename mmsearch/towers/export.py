"""ONNX graphs without weights of their own: every initialiser points into the weights files beside them.

The cold query path runs these by onnxruntime, without torch. What it runs are exactly the stored bytes:
halves followed by a Cast, the 8-bit token table as Gather, Cast and Mul by the gathered scale.
onnxruntime folds the casts when it makes the session, and then fuses as it would in a plain graph.

Decisions:
- The model that is exported is the one loaded back from the stored weights, so a graph and the torch model
  of a directory agree to rounding.
- A tensor is recognised by its name, which the exporter keeps. While the graph is simplified the stored tensors
  stand as inputs, so that nothing is folded into them; whatever the exporter made itself (small constants)
  stays inside the graph, at most `_MAX_EMBEDDED` bytes in all.
- Batch and token axes are dynamic; pictures go in as uint8 (b, s, s, 3), scaling included.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir
import onnxscript.optimizer
import torch
from torch import Tensor, nn

from mmsearch.errors import ModelError
from mmsearch.towers.tensors import QUANTISED, SCALE, Stored, read_layout

if TYPE_CHECKING:
    from mmsearch.towers.dual_encoder import DualEncoder

IDS, MASK, PIXELS, ROWS = "ids", "mask", "pixels", "rows"
_MAX_EMBEDDED = 1 << 20
_Layout: TypeAlias = Mapping[str, tuple[Stored, str]]
"""Tensor name -> where it lies in which file."""
_DTYPES = {"F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT, "I8": ir.DataType.INT8, "I64": ir.DataType.INT64}


class _TextGraph(nn.Module):
    """(ids, mask) -> rows; the tower sits under the name it has in the stored weights."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        rows: Tensor = self.text(ids, mask)
        return rows


class _ImageGraph(nn.Module):
    """pixels -> rows, scaling included."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.image, self.normalise = model.image, model.normalise_pixels

    def forward(self, pixels: Tensor) -> Tensor:
        rows: Tensor = self.image(self.normalise(pixels))
        return rows


def text_graph(model: DualEncoder, weights: Path) -> bytes:
    """The text tower as ONNX, to lie beside `weights`, which must hold the model's stored tensors."""
    ids = torch.ones(2, 5, dtype=torch.int64)
    axes = {IDS: {0: "b", 1: "t"}, MASK: {0: "b", 1: "t"}}
    return export_graph(_TextGraph(model), (ids, torch.ones_like(ids)), axes=axes, outputs=[ROWS], weights=[weights])


def image_graph(model: DualEncoder, weights: Path) -> bytes:
    """The image tower as ONNX, to lie beside `weights`, which must hold the model's stored tensors."""
    size = model.config.preprocessing.size
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    return export_graph(_ImageGraph(model), (pixels,), axes={PIXELS: {0: "b"}}, outputs=[ROWS], weights=[weights])


def export_graph(
    module: nn.Module,
    example: tuple[Tensor, ...],
    *,
    axes: dict[str, dict[int, str]],
    outputs: Sequence[str],
    weights: Sequence[Path],
) -> bytes:
    """`module` as ONNX, to lie beside `weights`: the files that hold its tensors under the names they have in it.

    `axes`: for every input by name, in order, which axes are dynamic; two of one name are equal. Raises `ModelError`
    when more than a few small constants would have to be stored in the graph, and what torch's exporter raises.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter talks about axis names that two inputs share
        program: Any = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(axes),
            output_names=list(outputs),
            # By place: a module's own argument names are nobody's business
            dynamic_shapes=tuple(axes.values()),
        )
    model: ir.Model = program.model
    point_into(model, {path.name: read_layout(path) for path in weights})
    _drop_notes(model)
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def point_into(model: ir.Model, files: Mapping[str, Mapping[str, Stored]]) -> None:
    """Simplify the graph, then make each stored tensor a reference to its bytes. `files`: layouts by file name."""
    graph = model.graph
    layout = {name: (stored, location) for location, held in files.items() for name, stored in held.items()}
    outside = {name: value for name, value in graph.initializers.items() if _is_stored(value, layout)}
    for name, value in outside.items():
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    onnxscript.optimizer.optimize_ir(model)
    for name, value in outside.items():
        graph.inputs.remove(value)
        if name + QUANTISED in layout:
            _gather_rows(graph, value, layout)
        else:
            _cast(graph, value, layout[name])
    inside = [v.const_value for v in graph.initializers.values() if not isinstance(v.const_value, ir.ExternalTensor)]
    left = sum(tensor.nbytes for tensor in inside if tensor is not None)
    if left > _MAX_EMBEDDED:
        raise ModelError("export", expected="weights that keep their names", got=f"{left} bytes that do not")


def _is_stored(value: ir.Value, layout: _Layout) -> bool:
    name, shape = str(value.name), tuple(value.shape or ())
    return (name in layout and layout[name][0].shape == shape) or name + QUANTISED in layout


def _reference(graph: ir.Graph, name: str, place: tuple[Stored, str]) -> ir.Value:
    stored, location = place
    dtype, shape = _DTYPES[stored.dtype], ir.Shape(stored.shape)
    tensor = ir.ExternalTensor(location, stored.offset, stored.length, dtype, shape=shape, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _cast(graph: ir.Graph, value: ir.Value, place: tuple[Stored, str]) -> None:
    """NAME -> reference to the stored bytes, and a Cast where they are not float32."""
    name = str(value.name)
    if _DTYPES[place[0].dtype] == value.dtype:
        ir.convenience.replace_all_uses_with(value, _reference(graph, name, place))
        return
    source = _reference(graph, name + ".stored", place)
    cast = ir.node("Cast", [source], {"to": ir.DataType.FLOAT})
    graph.insert_before(graph[0], cast)
    _take_over(value, cast.outputs[0])


def _gather_rows(graph: ir.Graph, value: ir.Value, layout: _Layout) -> None:
    """Gather(table, ids) -> Cast(Gather(q8, ids)) · Cast(Gather(scale, ids))."""
    name = str(value.name)
    q8, scale = (_reference(graph, name + end, layout[name + end]) for end in (QUANTISED, SCALE))
    for gather, _ in list(value.uses()):
        if gather.op_type != "Gather":
            raise ModelError("export", expected="a token table that is only looked up", got=gather.op_type)
        rows = [ir.node("Gather", [part, gather.inputs[1]], {"axis": 0}) for part in (q8, scale)]
        casts = [ir.node("Cast", [row.outputs[0]], {"to": ir.DataType.FLOAT}) for row in rows]
        product = ir.node("Mul", [cast.outputs[0] for cast in casts])
        graph.insert_before(gather, [*rows, *casts, product])
        _take_over(gather.outputs[0], product.outputs[0])
        graph.remove(gather, safe=True)


def _take_over(old: ir.Value, new: ir.Value) -> None:
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new)


def _drop_notes(model: ir.Model) -> None:
    """Leave out what the exporter notes about source lines and paths: bytes nobody runs."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
