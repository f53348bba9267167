"""Buffers in a device's memory that numpy code can work with: what a host does between two runs stays on the device.

    x[...] = array                      # copied to the device
    np.multiply(y, 0.3, out=y)          # computed there (multiply, add and subtract, whole arrays and numbers)
    np.subtract(x, y, out=x)
    np.sum(x)                           # one number comes back
    np.asarray(x)                       # copied to the host

So the loops of `tmd_runtime` are written once. Sums and products are rounded to float32 as numpy rounds them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from math import prod
from typing import Any

import numpy as np

# ufunc -> the factors (a, b) of a·x + b·y; None: the factor is the other operand.
_FACTORS: dict[Any, tuple[float, float]] = {np.add: (1.0, 1.0), np.subtract: (1.0, -1.0)}


class DeviceArray(ABC):
    """A C-contiguous array on a device. An implementation gives the memory, two copies and two operations."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.ndim, self.size = len(shape), prod(shape)
        self.nbytes = self.size * self.dtype.itemsize

    @property
    @abstractmethod
    def address(self) -> int:
        """Where it begins in the device's memory."""

    @abstractmethod
    def write(self, values: np.ndarray) -> None:
        """Copies from the host; `values` has this shape and dtype and is C-contiguous. Raises EngineError."""

    @abstractmethod
    def read(self) -> np.ndarray:
        """A copy on the host. Raises EngineError."""

    @abstractmethod
    def combine(self, a: float, x: DeviceArray, b: float, y: DeviceArray) -> None:
        """Becomes a·x + b·y, of arrays of this shape, in float32. `x` and `y` may be this array. Raises EngineError."""

    @abstractmethod
    def sum(self, axis: None = None, dtype: Any = None, out: None = None) -> float:
        """Sum of all values, NaN or Inf if one of them is. Raises EngineError."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not Ellipsis:
            raise TypeError("a device array is written whole: x[...] = values")
        if isinstance(value, DeviceArray):
            self.combine(1.0, value, 0.0, value)
        else:
            self.write(np.ascontiguousarray(np.broadcast_to(np.asarray(value, self.dtype), self.shape)))

    def __getitem__(self, key: Any) -> Any:
        return self.read()[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on a device cannot be seen from the host without a copy")
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def astype(self, dtype: Any, copy: bool = True) -> np.ndarray:
        """A copy on the host in another dtype."""
        return self.read().astype(dtype, copy=False)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **others: Any) -> Any:
        target = out[0] if out else None
        if method != "__call__" or others or len(inputs) != 2 or not isinstance(target, DeviceArray):
            return NotImplemented
        arrays = [each for each in inputs if isinstance(each, DeviceArray)]
        if ufunc is np.multiply and len(arrays) == 1:
            (factor,) = (each for each in inputs if not isinstance(each, DeviceArray))
            if np.ndim(factor):
                return NotImplemented
            target.combine(float(factor), arrays[0], 0.0, arrays[0])
        elif ufunc in _FACTORS and len(arrays) == 2:
            a, b = _FACTORS[ufunc]
            target.combine(a, arrays[0], b, arrays[1])
        else:
            return NotImplemented
        return target


def rows_and_columns(size: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """An array of `shape` seen in two dimensions, which is how the graphs below take it."""
    columns = shape[-1] if shape else 1
    return size // columns, columns


@cache
def combine_graph() -> bytes:
    """An ONNX graph of out = a·x + b·y: a and b float32 `[1, 1]`, x, y and out float32 `[rows, columns]`."""
    from onnx import helper

    nodes = [
        helper.make_node("Mul", ["a", "x"], ["ax"]),
        helper.make_node("Mul", ["b", "y"], ["by"]),
        helper.make_node("Add", ["ax", "by"], ["out"]),
    ]
    plane = ["rows", "columns"]
    return _model("combine", nodes, {"a": [1, 1], "x": plane, "b": [1, 1], "y": plane}, {"out": plane})


@cache
def sum_graph() -> bytes:
    """An ONNX graph of the sum of x: float32 `[rows, columns]` in, float32 `[1, 1]` out."""
    from onnx import TensorProto, helper

    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [0, 1])
    nodes = [helper.make_node("ReduceSum", ["x", "axes"], ["out"], keepdims=1)]
    return _model("sum", nodes, {"x": ["rows", "columns"]}, {"out": [1, 1]}, [axes])


def _model(name: str, nodes: Any, inputs: Any, outputs: Any, weights: Any = ()) -> bytes:
    from onnx import TensorProto, helper

    values = [
        [helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape) for tensor, shape in side.items()]
        for side in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, name, values[0], values[1], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content
