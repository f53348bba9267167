"""Large matrices as int8 in the data file, in blocks of `BLOCK` values with a scale each: a quarter of float32's size.

Of the weights only: a `DequantizeLinear` stands before every product, and the graph's arithmetic stays float32. ONNX
Runtime and OpenVINO take both nodes for one and compute it on the int8 values, faster than in float32 (docs/wan.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .weights import CHUNK_BYTES, SMALL, Weights

if TYPE_CHECKING:
    import onnx_ir as ir

BLOCK = 128  # values along a column; of 32, ONNX Runtime needs 1.5 times the time, and the error is 0.8 of this
SMALLEST_BLOCK = 16
VALUES, SCALES = ".int8", ".scale"


class Int8Weights:
    """What `storage` asks of `Weights`, with int8 values and scales in the place of some weights."""

    def __init__(self, weights: Weights, blocks: dict[str, int]) -> None:
        """`blocks`: name of a quantized weight, in its layout -> values per block."""
        self._weights, self._blocks = weights, blocks

    def __contains__(self, name: str) -> bool:
        return self._split(name)[0] in self._weights

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """See `Weights.form`."""
        weight, kind = self._split(name)
        shape, dtype = self._weights.form(weight)
        if kind is None:
            return shape, dtype
        if kind == VALUES:
            return shape, torch.int8
        return torch.Size((shape[0] // self._blocks[weight], shape[1])), torch.float32

    def chunks(self, name: str) -> Iterator[Tensor]:
        """See `Weights.chunks`. The value nearest to w / scale, where the largest of a block is 127 or -127."""
        weight, kind = self._split(name)
        if kind is None:
            yield from self._weights.chunks(name)
            return
        matrix, block = self._weights.laid_out(weight), self._blocks[weight]
        rows = max(1, CHUNK_BYTES // (4 * matrix.shape[1] * block)) * block
        for start in range(0, matrix.shape[0], rows):
            piece = matrix[start : start + rows].float().unflatten(0, (-1, block))
            largest = piece.abs().amax(dim=1, keepdim=True)
            scale = torch.where(largest > 0, largest / 127, 1.0)
            yield scale.squeeze(1) if kind == SCALES else (piece / scale).round().to(torch.int8).flatten(0, 1)

    def _split(self, name: str) -> tuple[str, str | None]:
        for suffix in (VALUES, SCALES):
            if name.removesuffix(suffix) in self._blocks and name.endswith(suffix):
                return name.removesuffix(suffix), suffix
        return name, None


def int8_bytes(weights: Weights) -> int:
    """About what `weights` take in a file whose matrices are int8."""
    sizes = ((shape.numel(), dtype.itemsize) for shape, dtype in weights.specs.values())
    return sum(size * itemsize if size <= SMALL else size + 4 * size // BLOCK for size, itemsize in sizes)


def to_int8(model: ir.Model, weights: Weights) -> Int8Weights:
    """Makes every large matrix that a `MatMul` takes from `weights` an int8 one, in place; returns what to write.

    A matrix whose columns do not divide into blocks stays as it is.
    """
    import onnx_ir as ir

    blocks: dict[str, int] = {}
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        name = weight.name if weight is not None and weight.is_initializer() else None
        if weight is None or name is None or name not in weights:
            continue
        shape, _ = weights.form(name)
        block = BLOCK
        while shape[0] % block and block >= SMALLEST_BLOCK:
            block //= 2
        if len(shape) != 2 or shape.numel() <= SMALL or block < SMALLEST_BLOCK:
            continue
        blocks[name] = block
        values, scales = ir.Value(name=name + VALUES), ir.Value(name=name + SCALES)
        values.type, values.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(shape)
        scales.type, scales.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((shape[0] // block, shape[1]))
        dequantize = ir.node(
            "DequantizeLinear",
            [values, scales],
            attributes={"axis": 0, "block_size": block},
            name=f"node_fp32_{name}",
        )
        dequantize.outputs[0].name = f"{name}.fp32"
        graph.insert_before(node, dequantize)
        weight.replace_all_uses_with(dequantize.outputs[0])
        del graph.initializers[name]
        graph.initializers[name + VALUES], graph.initializers[name + SCALES] = values, scales
    return Int8Weights(weights, blocks)
