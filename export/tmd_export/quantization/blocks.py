"""NVFP4: E2M1 in blocks of 16 with E4M3 scales. Weights are in it for good, activations are rounded while running.

The form of the nodes is that of `tmd_engines.bundle.float4`, and what they compute that of `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tmd_engines.bundle.float4 import BLOCK, BLOCK_SCALES, FLOAT4, FLOAT8

from . import nvfp4
from .format import Form, Format
from .layers import Layer
from .nodes import add, constant
from .scaled import VALUES

if TYPE_CHECKING:
    import onnx_ir as ir

TENSOR_SCALE = ".tensor_scale"


@dataclass(frozen=True)
class Blocks(Format):
    """E2M1 for linear layers; `instead` is the format of what cannot have it, or is kept from it.

    Those are attention, whose softmax lies in 0 to 1 with most values next to 0, and layers whose rows do not divide
    into blocks.
    """

    instead: Format
    ir_version = 11

    def of(self, layer: Layer, kept: bool = False) -> Format | None:
        """See `Format.of`."""
        if kept or layer.is_attention or layer.rows % BLOCK:
            return self.instead.of(layer)
        return self

    def activation(
        self, graph: ir.Graph, value: ir.Value, name: str, largest: float, before: ir.Node, dtype: torch.dtype
    ) -> ir.Value:
        """See `Format.activation`."""
        scale = constant(graph, f"{name}.input{TENSOR_SCALE}", _scalar(nvfp4.tensor_scale(largest)))
        return _rounded(graph, value, scale, f"{name}.input", before, dtype)

    def parts(self, shape: torch.Size, dtype: torch.dtype) -> dict[str, Form]:
        """See `Format.parts`."""
        rows, columns = shape
        return {
            VALUES: (shape, torch.float4_e2m1fn_x2),
            BLOCK_SCALES: (torch.Size((rows // BLOCK, columns)), torch.float8_e4m3fn),
            TENSOR_SCALE: (torch.Size(()), torch.float32),
        }

    def stored(self, parts: Mapping[str, ir.Value], name: str, before: ir.Node, dtype: torch.dtype) -> ir.Value:
        """See `Format.stored`."""
        scales = add("DequantizeLinear", [parts[BLOCK_SCALES], parts[TENSOR_SCALE]], f"{name}.wide_scale", before)
        narrow = _cast(scales, f"{name}.scale", before, dtype)
        return add("DequantizeLinear", [parts[VALUES], narrow], f"{name}.dequantized", before, axis=0, block_size=BLOCK)

    def scales(self, pieces: Iterable[Tensor], dtype: torch.dtype) -> float:
        """See `Format.scales`: the tensor scale."""
        return nvfp4.tensor_scale(max(float(piece.abs().max()) for piece in pieces))

    def chunks(self, part: str, pieces: Iterable[Tensor], scales: float) -> Iterator[Tensor]:
        """See `Format.chunks`."""
        if part == TENSOR_SCALE:
            yield torch.tensor(scales)
            return
        for piece in pieces:
            codes, block_scales = nvfp4.quantize(np.ascontiguousarray(piece.numpy().T), scales)
            if part == BLOCK_SCALES:
                yield torch.from_numpy(np.ascontiguousarray(block_scales.T))
            else:
                yield torch.from_numpy(nvfp4.pack(np.ascontiguousarray(codes.T)))


def _rounded(
    graph: ir.Graph, value: ir.Value, scale: ir.Value, name: str, before: ir.Node, dtype: torch.dtype
) -> ir.Value:
    """`value` rounded in blocks along its last axis. Scales are found, and values divided by them, in float32."""
    import onnx_ir as ir

    size = add("Abs", [value], f"{name}.size", before)
    outer = add("Shape", [value], f"{name}.outer", before, end=-1)
    grid = [outer, constant(graph, "float4_blocks", np.array([-1, BLOCK]))]
    blocks = add("Concat", grid, f"{name}.grid", before, axis=0)
    rows = add("Reshape", [size, blocks], f"{name}.blocks", before)
    largest = add("ReduceMax", [rows, constant(graph, "last_axis", np.array([-1]))], f"{name}.max", before, keepdims=0)
    if dtype != torch.float32:
        largest = add("Cast", [largest], f"{name}.wide_max", before, to=int(ir.DataType.FLOAT))
    exact = add("Div", [largest, constant(graph, "float4_largest", _scalar(nvfp4.LARGEST))], f"{name}.exact", before)
    scales = add("QuantizeLinear", [exact, scale], f"{name}.scales", before, output_dtype=FLOAT8)
    wide = add("DequantizeLinear", [scales, scale], f"{name}.wide_scales", before)
    least = constant(graph, "float4_least", _scalar(nvfp4.LEAST_DIVISOR))
    divisor = add("Clip", [wide, least], f"{name}.divisor", before)
    along = {"axis": -1, "block_size": BLOCK}
    values = add("QuantizeLinear", [value, divisor], f"{name}_quantized", before, output_dtype=FLOAT4, **along)
    narrow = _cast(wide, f"{name}.narrow_scales", before, dtype)
    return add("DequantizeLinear", [values, narrow], f"{name}.values", before, **along)


def _cast(scales: ir.Value, name: str, before: ir.Node, dtype: torch.dtype) -> ir.Value:
    """`scales`, float32, in `dtype`: exact, because they have 4 bits of mantissa."""
    import onnx_ir as ir

    if dtype == torch.float32:
        return scales
    names = {torch.bfloat16: ir.DataType.BFLOAT16, torch.float16: ir.DataType.FLOAT16}
    return add("Cast", [scales], name, before, to=int(names[dtype]))


def _scalar(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)
