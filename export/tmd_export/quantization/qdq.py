"""The rewriting of a graph: its large products between DequantizeLinear and, for fp8, attention in primitives.

    linear:     x - Quantize - Dequantize - MatMul(., Dequantize(weight)) - Add
    attention:  q·scale, k, v - heads - Quantize - Dequantize; MatMul - Softmax - Quantize - Dequantize - MatMul - merge

These are the patterns that TensorRT's parser fuses (NVIDIA, "Working with Quantized Types", and the importer of
onnx-tensorrt): a zero point that names the type, scales in the type of the activation, one scale per activation and
one per channel of a weight, the weight's Dequantize straight into the product, the factor of the scores before q's
Quantize. The operator `Attention` has no place for a Quantize behind its softmax, so that attention in fp8 is written
out; the values that it rounds are then part of the graph, and every engine computes the same. Its fused kernels take
heads of a multiple of 16, so that heads of another width are filled up with zeros, which change no sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import ml_dtypes
import numpy as np
import torch

from ..errors import ExportError
from ..weights.precision import DTYPES
from ..weights.weights import Weights
from .formats import FORMATS, Format
from .layers import Layer, find
from .weights import SCALES, VALUES, QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

_HEAD_UNIT = 16  # NVIDIA/TensorRT, demo/Diffusion/demo_diffusion/utils_modelopt.py
_ROWS, _COLUMNS = [0, 2, 1, 3], [0, 2, 3, 1]  # [B, S, heads, D] -> [B, heads, S, D] and [B, heads, D, S]
_NUMPY: Mapping[torch.dtype, Any] = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.int8: np.int8,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
}


class Rounding(Protocol):
    """How a value is quantized: for good (`_Stored`), or in another manner."""

    format: Format

    def activation(self, value: ir.Value, name: str, largest: float, before: ir.Node) -> ir.Value:
        """`value`, rounded with `largest` as the largest value there is. `name` is that of its range."""

    def weight(self, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
        """The weight `[K, N]` of the layer `name`, rounded with a scale per column."""


def quantize(
    model: ir.Model,
    weights: Weights,
    precision: str,
    ranges: Mapping[str, float],
    products: str,
    kept: frozenset[str] = frozenset(),
    dtype: torch.dtype | None = None,
) -> QuantizedWeights:
    """Quantizes the products of `model`, as `trace` gives it, in place; returns what to write as its weights.

    `ranges`: largest absolute value of every activation, by the names of `Layer.operands`. `products`: see
    `layers.find`. `kept`: layers that stay as they are. `dtype`: that of the products (None: as in a bundle).
    Raises ExportError if a range is missing.
    """
    rounding = _Stored(model.graph, weights, FORMATS[precision], dtype or DTYPES[precision])
    layers = find(model, products, rounding.format.attention)
    rewrite(model.graph, [layer for layer in layers if layer.name not in kept], ranges, rounding)
    return QuantizedWeights(weights, rounding.formats)


def rewrite(graph: ir.Graph, layers: list[Layer], ranges: Mapping[str, float], rounding: Rounding) -> None:
    """Puts rounded values in front of the products `layers`. Raises ExportError if a range is missing."""
    for layer in layers:
        missing = [name for name in layer.operands if name not in ranges]
        if missing:
            raise ExportError(
                f"the calibration has no range for {missing[0]}: it was made for another model. Leave --calibration "
                "out to calibrate anew."
            )
        room = {name: rounding.format.headroom * ranges[name] for name in layer.operands}
        if layer.is_attention:
            _write_out(graph, layer, room, rounding)
            continue
        node = layer.node
        x, weight = node.inputs
        if x is not None and weight is not None:
            node.replace_input_with(0, rounding.activation(x, layer.name, room[layer.name], node))
            node.replace_input_with(1, rounding.weight(weight, layer.name, node))


class _Stored:
    """Quantizes for good: scales are constants in `dtype`, weights values of the format."""

    def __init__(self, graph: ir.Graph, weights: Weights, format: Format, dtype: torch.dtype) -> None:
        self.format, self.formats = format, dict[str, Format]()
        self._graph, self._weights, self._dtype = graph, weights, dtype
        self._done: dict[tuple[str | None, float], ir.Value] = {}  # q, k and v read the same value

    def activation(self, value: ir.Value, name: str, largest: float, before: ir.Node) -> ir.Value:
        key = value.name, largest
        if key not in self._done:
            scale = np.asarray(largest / self.format.largest or 1.0, _NUMPY[self._dtype])
            scaled = constant(self._graph, f"{name}.input_scale", scale)
            zero = constant(self._graph, "quantized_zero", np.zeros((), _NUMPY[self.format.dtype]))
            quantized = add("QuantizeLinear", [value, scaled, zero], f"{name}.input_quantized", before)
            self._done[key] = add("DequantizeLinear", [quantized, scaled, zero], f"{name}.input", before)
        return self._done[key]

    def weight(self, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
        import onnx_ir as ir

        weight = value.name or name
        shape, dtype = self._weights.form(weight)
        values = _weight(weight + VALUES, self.format.onnx, shape)
        scales = _weight(weight + SCALES, ir.DataType.from_numpy(np.dtype(_NUMPY[dtype])).name, shape[1:])
        del self._graph.initializers[weight]
        self._graph.initializers[weight + VALUES], self._graph.initializers[weight + SCALES] = values, scales
        self.formats[weight] = self.format
        return add("DequantizeLinear", [values, scales], f"{weight}.dequantized", before, axis=1)


def _write_out(graph: ir.Graph, layer: Layer, room: Mapping[str, float], rounding: Rounding) -> None:
    """softmax(scale q k^T) v in primitives, all four factors quantized, in place of the operator."""
    node, name = layer.node, layer.name
    heads = node.attributes["q_num_heads"].as_int()
    q, k, v = node.inputs[:3]
    if q is None or k is None or v is None:
        raise ExportError(f"{name} has not the three inputs of an attention.")
    stated, width = node.attributes.get("scale"), layer.width // heads
    scale = stated.as_float() if stated else 1 / math.sqrt(width)
    split, missing = constant(graph, f"split_{heads}", np.array([0, 0, heads, -1])), -width % _HEAD_UNIT

    def factor(value: ir.Value, part: str, order: list[int], largest: float) -> ir.Value:
        rows = add("Reshape", [value, split], f"{name}.{part}_split", node)
        if missing:
            behind = constant(graph, f"fill_{width}", np.array([0] * 7 + [missing]))
            rows = add("Pad", [rows, behind], f"{name}.{part}_filled", node)
        turned = add("Transpose", [rows], f"{name}.{part}_heads", node, perm=order)
        return rounding.activation(turned, f"{name}.{part}", largest, node)

    scores = add(
        "MatMul",
        [
            factor(_scaled(graph, q, scale, name, node), "q", _ROWS, scale * room[f"{name}.q"]),
            factor(k, "k", _COLUMNS, room[f"{name}.k"]),
        ],
        f"{name}.scores",
        node,
    )
    shares = add("Softmax", [scores], f"{name}.shares", node, axis=-1)
    shares = rounding.activation(
        shares, f"{name}.shares", 1.0, node
    )  # of a softmax, whatever its input: no room needed
    mixed = add("MatMul", [shares, factor(v, "v", _ROWS, room[f"{name}.v"])], f"{name}.mixed", node)
    rows = add("Transpose", [mixed], f"{name}.rows", node, perm=_ROWS)
    if missing:
        cut = [constant(graph, f"cut_{at}", np.array([at])) for at in (0, width, 3)]  # start, end, axis
        rows = add("Slice", [rows, *cut], f"{name}.own", node)
    merged = add("Reshape", [rows, constant(graph, "merge", np.array([0, 0, -1]))], f"{name}.merged", node)
    node.outputs[0].replace_all_uses_with(merged)
    graph.remove(node, safe=True)


def _scaled(graph: ir.Graph, q: ir.Value, scale: float, name: str, before: ir.Node) -> ir.Value:
    """q times the factor of the scores, multiplied in float32: the factor itself would lose up to 0.4 % in bfloat16."""
    maker = q.producer()
    factor = constant(graph, f"{name}.factor", np.asarray(scale, np.float32))
    if maker is None or maker.op_type != "Cast" or maker.inputs[0] is None:
        return add("Mul", [q, factor], f"{name}.scaled", before)
    wide = add("Mul", [maker.inputs[0], factor], f"{name}.scaled", before)
    return add("Cast", [wide], f"{name}.scaled_cast", before, to=maker.attributes["to"].as_int())


def add(operator: str, inputs: list[ir.Value], name: str, before: ir.Node, **attributes: Any) -> ir.Value:
    """The result, called `name`, of a new node in front of the node `before`."""
    import onnx_ir as ir

    node = ir.node(operator, inputs, attributes=attributes, name=f"node_{name}")
    node.outputs[0].name = name
    if before.graph is None:
        raise ValueError(f"{before.name} belongs to no graph")
    before.graph.insert_before(before, node)
    return node.outputs[0]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer with these values; the one of that name if there is one."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def _weight(name: str, dtype: str, shape: torch.Size) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))
