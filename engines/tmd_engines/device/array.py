"""Buffers in a device's memory. What a host does with one is to write it, to read it, and to copy it to another.

    x[...] = array          # from the host to the device
    x[...] = y              # from one buffer of the device to another, without the host
    np.asarray(x)           # a copy on the host

The same three lines work on numpy arrays, so the loops of `tmd_runtime` are written once. Arithmetic is in the graphs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod
from typing import Any

import numpy as np


class DeviceArray(ABC):
    """A C-contiguous array on a device. An implementation gives the memory and the three copies."""

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
    def copy_from(self, other: DeviceArray) -> None:
        """Copies another array of this shape and dtype, on the device. Raises EngineError."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if key is not Ellipsis:
            raise TypeError("a device array is written whole: x[...] = values")
        if not isinstance(value, DeviceArray):
            self.write(np.ascontiguousarray(np.broadcast_to(np.asarray(value, self.dtype), self.shape)))
        elif (value.shape, value.dtype) != (self.shape, self.dtype):
            raise ValueError(
                f"{value.dtype} {list(value.shape)} on a device cannot be copied into {self.dtype} {list(self.shape)}"
            )
        else:
            self.copy_from(value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("an array on a device cannot be seen from the host without a copy")
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)
