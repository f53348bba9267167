"""The rewriting of a graph: its large products between DequantizeLinear and, for fp8, attention in primitives.

    linear:     x - Quantize - Dequantize - MatMul(., Dequantize(weight)) - Add      (nvfp4: see `blocks`)
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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from ..errors import ExportError
from ..weights.precision import DTYPES
from ..weights.storage import IR_NAMES
from ..weights.weights import Weights
from .format import Format
from .formats import FORMATS
from .layers import Layer, find
from .nodes import add, constant
from .nodes import weight as new_weight
from .weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

_HEAD_UNIT = 16  # NVIDIA/TensorRT, demo/Diffusion/demo_diffusion/utils_modelopt.py
_ROWS, _COLUMNS = [0, 2, 1, 3], [0, 2, 3, 1]  # [B, S, heads, D] -> [B, heads, S, D] and [B, heads, D, S]


class Rounding(Protocol):
    """How a value is quantized: for good (`_Stored`), or in another manner."""

    def activation(self, value: ir.Value, name: str, largest: float, before: ir.Node, format: Format) -> ir.Value:
        """`value`, rounded with `largest` as the largest value there is. `name` is that of its range."""

    def weight(self, value: ir.Value, name: str, before: ir.Node, format: Format) -> ir.Value:
        """The weight `[K, N]` of the layer `name`, rounded."""


def quantize(
    model: ir.Model,
    weights: Weights,
    precision: str,
    ranges: Mapping[str, float],
    products: str,
    kept: frozenset[str] = frozenset(),
    exact: frozenset[str] = frozenset(),
    dtype: torch.dtype | None = None,
) -> QuantizedWeights:
    """Quantizes the products of `model`, as `trace` gives it, in place; returns what to write as its weights.

    `ranges`: largest absolute value of every activation, by the names of `Layer.operands`. `products`: see
    `layers.find`. `kept`: layers that stay out of the format, `exact` those that stay as they are. `dtype`: that of the
    products (None: as in a bundle). Raises ExportError if a range is missing.
    """
    asked = FORMATS[precision]
    rounding = _Stored(model.graph, weights, dtype or DTYPES[precision])
    layers = [layer for layer in find(model, products, asked.attention) if layer.name not in exact]
    chosen = [(layer, asked.of(layer, layer.name in kept)) for layer in layers]
    rewrite(model.graph, [(layer, format) for layer, format in chosen if format], ranges, rounding)
    model.ir_version = max(model.ir_version, *(format.ir_version for _, format in chosen if format), 0)
    return QuantizedWeights(weights, rounding.formats)


def rewrite(
    graph: ir.Graph, layers: Sequence[tuple[Layer, Format]], ranges: Mapping[str, float], rounding: Rounding
) -> None:
    """Puts rounded values in front of the products `layers`. Raises ExportError if a range is missing."""
    for layer, format in layers:
        missing = [name for name in layer.operands if name not in ranges]
        if missing:
            raise ExportError(
                f"the calibration has no range for {missing[0]}: it was made for another model. Leave --calibration "
                "out to calibrate anew."
            )
        room = {name: format.headroom * ranges[name] for name in layer.operands}
        if layer.is_attention:
            _write_out(graph, layer, room, rounding, format)
            continue
        node = layer.node
        x, weight = node.inputs
        if x is not None and weight is not None:
            node.replace_input_with(0, rounding.activation(x, layer.name, room[layer.name], node, format))
            node.replace_input_with(1, rounding.weight(weight, layer.name, node, format))


class _Stored:
    """Quantizes for good: scales are constants, weights the parts of their format."""

    def __init__(self, graph: ir.Graph, weights: Weights, dtype: torch.dtype) -> None:
        self.formats: dict[str, Format] = {}
        self._graph, self._weights, self._dtype = graph, weights, dtype
        self._done: dict[tuple[str | None, float, Format], ir.Value] = {}  # q, k and v read the same value

    def activation(self, value: ir.Value, name: str, largest: float, before: ir.Node, format: Format) -> ir.Value:
        key = value.name, largest, format
        if key not in self._done:
            self._done[key] = format.activation(self._graph, value, name, largest, before, self._dtype)
        return self._done[key]

    def weight(self, value: ir.Value, name: str, before: ir.Node, format: Format) -> ir.Value:
        weight = value.name or name
        shape, dtype = self._weights.form(weight)
        del self._graph.initializers[weight]
        parts = {
            part: new_weight(self._graph, weight + part, IR_NAMES[kind], tuple(size))
            for part, (size, kind) in format.parts(shape, dtype).items()
        }
        self.formats[weight] = format
        return format.stored(parts, weight, before, dtype)


def _write_out(graph: ir.Graph, layer: Layer, room: Mapping[str, float], rounding: Rounding, format: Format) -> None:
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
        return rounding.activation(turned, f"{name}.{part}", largest, node, format)

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
    # Of a softmax, whatever its input: no room needed.
    shares = rounding.activation(shares, f"{name}.shares", 1.0, node, format)
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
