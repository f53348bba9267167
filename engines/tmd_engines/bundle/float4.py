"""The form that NVFP4 has in a bundle: float4 (E2M1) in blocks of 16, each with a scale in E4M3, and one float32 scale.

Weights `[K, N]` are float4 initializers, dequantized along K by their blocks' scales `[K/16, N]`, which a scalar
dequantizes. Activations are quantized while running, in operators of the standard domain:

    Abs(x) - Reshape to blocks - ReduceMax - (Cast) - Div by 6 - QuantizeLinear to E4M3, by the scalar     scales
    (blocks: Concat(Shape(x) without its end, [-1, 16]))
    QuantizeLinear(x, Clip(DequantizeLinear(scales, by the scalar))) to E2M1, in blocks along the last axis  values

A block whose scale is zero is zero; `Clip` keeps the division from being one by zero. `find_blocks` recognises the form
for engines that have one operator for it, and for the rules of an export.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import onnx

FLOAT4, FLOAT8 = 23, 17  # TensorProto's FLOAT4E2M1 and FLOAT8E4M3FN
BLOCK = 16
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Code of E2M1 -> value: one bit of sign, two of exponent, one of mantissa."""
LARGEST = max(VALUES)
BLOCK_SCALES = ".block_scale"  # what the names of a weight's scales end in


class Blocks(NamedTuple):
    """One quantization of an activation: `values` in E2M1, `scales` in E4M3; `scale` is the name of the scalar."""

    x: str
    scale: str
    scales: onnx.NodeProto
    values: onnx.NodeProto


def makes_float4(node: onnx.NodeProto) -> bool:
    """Whether a node quantizes to float4."""
    return node.op_type == "QuantizeLinear" and _numbers(node).get("output_dtype") == FLOAT4


def block_problem(node: onnx.NodeProto) -> str | None:
    """Why a node that quantizes to float4 has not the form above; None: it has."""
    attributes = _numbers(node)
    if attributes.get("axis") != -1 or attributes.get("block_size") != BLOCK or len(node.input) != 2:
        return f"quantizes to float4 in another form than blocks of {BLOCK} along the last axis"
    return None


def find_blocks(model: onnx.ModelProto) -> list[Blocks]:
    """Every quantization of an activation to float4 that has the form above, in the order of the graph."""
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = {weight.name: weight for weight in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if makes_float4(node) and block_problem(node) is None:
            blocks = _blocks(node, makers, weights)
            if blocks is not None:
                found.append(blocks)
    return found


def _blocks(
    values: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> Blocks | None:
    def maker(name: str, kind: str) -> onnx.NodeProto | None:
        node = makers.get(name)
        return node if node is not None and node.op_type == kind and node.domain in ("", "ai.onnx") else None

    x, divisor = values.input
    clip = maker(divisor, "Clip")
    dequantize = maker(clip.input[0], "DequantizeLinear") if clip is not None else None
    if dequantize is None or len(dequantize.input) != 2:
        return None
    scales = maker(dequantize.input[0], "QuantizeLinear")
    scale = dequantize.input[1]
    if scales is None or list(scales.input[1:]) != [scale] or not _is_scalar(weights.get(scale)):
        return None
    if _numbers(scales).get("output_dtype") != FLOAT8:
        return None
    division = maker(scales.input[0], "Div")
    if division is None or not _is_scalar(weights.get(division.input[1]), LARGEST):
        return None
    cast = maker(division.input[0], "Cast")
    largest = maker(cast.input[0] if cast is not None else division.input[0], "ReduceMax")
    if largest is None or len(largest.input) != 2 or _numbers(largest).get("keepdims", 1):
        return None
    if not _is_last(weights.get(largest.input[1])):
        return None
    rows = maker(largest.input[0], "Reshape")
    size = maker(rows.input[0], "Abs") if rows is not None else None
    if rows is None or size is None or size.input[0] != x:
        return None
    grid = maker(rows.input[1], "Concat")
    outer = maker(grid.input[0], "Shape") if grid is not None and len(grid.input) == 2 else None
    if grid is None or outer is None or outer.input[0] != x or _numbers(outer) != {"end": -1}:
        return None
    if _values(weights.get(grid.input[1])) != [(2,), -1, BLOCK]:
        return None
    return Blocks(x, scale, scales, values)


def _numbers(node: onnx.NodeProto) -> dict[str, int]:
    """The attributes of a node that are whole numbers."""
    from onnx import AttributeProto

    return {attribute.name: attribute.i for attribute in node.attribute if attribute.type == AttributeProto.INT}


def _values(tensor: onnx.TensorProto | None) -> list[Any] | None:
    """Those of a small tensor that lies in the graph."""
    from onnx import numpy_helper

    if tensor is None or tensor.external_data:
        return None
    array = numpy_helper.to_array(tensor)
    return [array.shape, *array.reshape(-1).tolist()]


def _is_scalar(tensor: onnx.TensorProto | None, value: float | None = None) -> bool:
    values = _values(tensor)
    return values is not None and values[0] == () and value in (None, values[1])


def _is_last(tensor: onnx.TensorProto | None) -> bool:
    return _values(tensor) == [(1,), -1]
