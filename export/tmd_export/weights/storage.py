"""A traced graph to its two files, and the weights in them back to their source: one piece of a tensor at a time.

What large weights cost in memory is one chunk, and in a file nothing but their values and the gaps between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ExportError
from .weights import SMALL

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 256  # larger tensors go to the data file; shapes and scalars stay where shape inference reads them
ALIGNMENT = 64  # of every tensor: a cache line, and the widest vector register
# ONNX Runtime maps a tensor from any offset since 1.23. Before, Windows needed multiples of its allocation granularity,
# and a tensor that starts on a page of its own can be dropped from memory without its neighbours anywhere.
LARGE_BYTES, LARGE_ALIGNMENT = 1 << 20, 1 << 16

# What is folded of a small weight can be larger than that: UMT5-XXL's position biases are [32, 64], and [183, 64] by
# distance.
FOLDED = 16 * SMALL  # elements

Report = Callable[[int, int], None]
"""Hears how many bytes of how many are done."""


class Stored(Protocol):
    """Weights as they are written: those of the source, or a rounding of them. See `weights.Weights`."""

    def __contains__(self, name: str) -> bool: ...

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]: ...

    def chunks(self, name: str) -> Iterator[Tensor]: ...


def save(model: ir.Model, weights: Stored, folder: Path, name: str, report: Report | None = None) -> Path:
    """Writes `name.onnx` and its one data file `name.onnx.data` into `folder`; returns the path of the first.

    The initializers of `model` that `weights` knows come from there. Raises ExportError if another one is large (its
    values would be a placeholder's), or if a weight has not the size or type that the graph expects.
    """
    import onnx_ir as ir

    path, data = folder / f"{name}.onnx", folder / f"{name}.onnx.data"
    slots = [_slot(value) for value in model.graph.initializers.values()]
    total, done = sum(slot.bytes for slot in slots if not slot.is_inline), 0
    with open(data, "xb") as file:
        for slot in slots:
            _check(slot, weights, path.name)
            size = slot.bytes
            if slot.is_inline:
                continue
            step = LARGE_ALIGNMENT if size >= LARGE_BYTES else ALIGNMENT
            offset = -(-file.tell() // step) * step
            file.seek(offset)
            for piece in _pieces(slot, weights):
                file.write(piece.data)
                done += piece.nbytes
                if report:
                    report(done, total)
            del piece  # it can be a view of the whole weight, and the next one is about to come
            if file.tell() != offset + size:
                raise ExportError(f"{path.name}: {slot.name} has {file.tell() - offset} bytes and not {size}.")
            slot.value.const_value = ir.ExternalTensor(
                data.name, offset, size, slot.dtype, shape=ir.Shape(slot.shape), name=slot.name, base_dir=folder
            )
        empty = not file.tell()
    if empty:
        data.unlink()
    ir.save(model, path)
    return path


def compare(path: Path, weights: Stored, report: Report | None = None) -> int:
    """Reads every weight in the data file of the graph `path` and compares it with its source, byte by byte.

    Returns how many weights were compared. Raises ExportError if one differs.
    """
    import onnx

    places = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if entry and tensor.name in weights:
            places[tensor.name] = int(entry["offset"]), int(entry["length"])
    total, done = sum(length for _, length in places.values()), 0
    with open(path.with_name(f"{path.name}.data"), "rb", buffering=0) as file:
        for name, (offset, length) in places.items():
            file.seek(offset)
            for chunk in weights.chunks(name):
                piece = _array(chunk)
                found = np.frombuffer(file.read(piece.nbytes), np.uint8)
                if not np.array_equal(found, piece):
                    raise ExportError(
                        f"{path.name}.data does not hold the weight {name} of its source: the disk is faulty, or the "
                        "source changed during the export. Export again."
                    )
                done += piece.nbytes
                if report:
                    report(done, total)
            del chunk, piece
            if file.tell() != offset + length:
                raise ExportError(f"{path.name}: {name} has a length that is not that of its source. Export again.")
    return len(places)


class _Slot(NamedTuple):
    """An initializer of a graph: what it is called and has place for."""

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    value: ir.Value

    @property
    def bytes(self) -> int:
        return int(math.prod(self.shape) * self.dtype.itemsize)

    @property
    def is_inline(self) -> bool:
        return self.bytes <= INLINE_BYTES and self.value.const_value is not None


def _slot(value: ir.Value) -> _Slot:
    if value.name is None or value.shape is None or value.dtype is None:
        raise ExportError(f"the initializer {value.name} has no name, shape or type.")
    return _Slot(value.name, tuple(value.shape.numpy()), value.dtype, value)


def _check(slot: _Slot, weights: Stored, where: str) -> None:
    """Raises ExportError unless the values of this initializer are known, and those that the graph expects."""
    if slot.name in weights:
        shape, dtype = weights.form(slot.name)
        if tuple(shape) != slot.shape or IR_NAMES[dtype] != slot.dtype.name:
            raise ExportError(
                f"{where}: the graph takes {slot.name} as {slot.dtype.name}{list(slot.shape)}, and the weight is "
                f"{IR_NAMES[dtype]}{list(shape)}. Use the versions in constraints.txt."
            )
    elif slot.value.const_value is None or slot.value.const_value.size > FOLDED:
        raise ExportError(
            f"{where}: the constant {slot.name} is none of the module's weights. A weight must reach the graph as it "
            "is, transposed or flattened; keep other constants small."
        )


IR_NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.int8: "INT8",
    torch.float8_e4m3fn: "FLOAT8E4M3FN",
    torch.float4_e2m1fn_x2: "FLOAT4E2M1",  # two in a byte, and torch names the byte
}
"""Type of a weight -> what ONNX calls it."""


def _pieces(slot: _Slot, weights: Stored) -> Iterator[np.ndarray]:
    if slot.name in weights:
        yield from map(_array, weights.chunks(slot.name))
    elif slot.value.const_value is not None:
        yield np.frombuffer(slot.value.const_value.tobytes(), np.uint8)


def _array(chunk: Tensor) -> np.ndarray:
    return chunk.reshape(-1).view(torch.uint8).numpy()
