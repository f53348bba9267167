"""Weights that were cast to fp8 and have no scale: W = weight.

Kijai and Comfy-Org publish Wan so (`..._fp8_e4m3fn`, without `scaled`). It is the last format to look: where a scale of
an unknown kind is in the file, that is named as a tensor that does not belong there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..mapped import Codes, Entry, Packed, Tensors
from .format import FP8, StorageFormat
from .rows import by_rows


class PlainFp8(StorageFormat):
    def unpack(self, tensors: Tensors) -> None:
        tensors.pack({name: _cast(tensors, name) for name, entry in tensors.entries.items() if entry.dtype in FP8})


def _cast(tensors: Tensors, name: str) -> Packed:
    entry = tensors.entries[name]
    rows = entry.shape or (1,)

    def read() -> Tensor:
        values = tensors.read_stored(name).reshape(rows)
        return by_rows(rows, lambda some: values[some].float()).reshape(entry.shape)

    def codes() -> Codes:
        return Codes(tensors.read_stored(name), torch.ones(rows[0]))

    return Packed(Entry(entry.shape, "bfloat16"), f"fp8 without scales ({entry.dtype})", (name,), read, codes)
