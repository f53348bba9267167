"""GGUF files as tensors: the weights that blocks of bits stand for, and those that are stored as they are.

Turning blocks into numbers is left to the library of the format (`gguf.quants`), some rows at a time. Its reader of
files is not used: see `gguf_header`.
"""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmd_engines.errors import quote

from ..errors import ExportError
from .gguf_header import Damaged, Header, Info, read_header
from .mapped import Entry, Packed, Place, Tensors, contiguous
from .storage.rows import by_rows

GGUF = ".gguf"

BLOCKS = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")
"""Types of blocks that are read. The tests have another reader or writer for each."""

_PLAIN = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
}  # fmt: skip
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."


def open_gguf(path: Path) -> Tensors:
    """The tensors of a GGUF file under their stored names; only the header is read.

    Strings of its metadata are in `metadata`. Raises ExportError if it is incomplete or stored in a type that is not
    read here.
    """
    gguf = _library()
    try:
        header = read_header(path)
        strings = {key: value for key, value in header.metadata.items() if isinstance(value, str)}
        tensors, packed = Tensors((path,), strings), {}
        places = []
        for info in header.infos:
            kind = _type_of(path, info, gguf)
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            places.append((info.first, info.first + _bytes(info, kind.name, per_block, block_bytes), info.name))
            shape = _shape(info, header)
            if kind.name in _PLAIN:
                entry = Entry(shape, _PLAIN[kind.name])
                tensors.add(info.name, entry, Place(path, info.first, contiguous(shape)))
                continue
            rows = (prod(info.sides[1:]), info.sides[0])
            stored = (rows[0], rows[1] // per_block * block_bytes)
            tensors.add(info.name, Entry(stored, "uint8"), Place(path, info.first, contiguous(stored)))
            read = partial(_dequantised, tensors, info.name, kind, rows, shape)
            packed[info.name] = Packed(Entry(shape, "bfloat16"), f"GGUF {kind.name}", (info.name,), read)
        _check_places(places, header.size)
    except Damaged as error:
        raise ExportError(f"{path} is not a complete GGUF file ({error}): copy it again.") from None
    tensors.pack(packed)
    return tensors


def _dequantised(tensors: Tensors, name: str, kind: Any, rows: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    quants, blocks = _library().quants, tensors.read_stored(name).numpy()

    def some(piece: slice) -> Tensor:
        with np.errstate(all="ignore"):  # where a scale is no number, neither is what it scales
            return torch.from_numpy(quants.dequantize(blocks[piece], kind))

    return by_rows(rows, some).reshape(shape)


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        raise ExportError(
            "GGUF files are read with the package gguf, which is not installed: pip install '.[export]' in tmd's "
            "checkout."
        ) from None
    return gguf


def _type_of(path: Path, info: Info, gguf: Any) -> Any:
    """The library's type of a tensor. Raises ExportError for one that is not read."""
    try:
        kind = gguf.GGMLQuantizationType(info.type)
        name = kind.name
    except ValueError:
        kind, name = None, f"the type with number {info.type}"
    if name in _PLAIN or name in BLOCKS:
        return kind
    raise ExportError(
        f"{path} stores {quote(info.name)} as {name}, which is not read here: take the same model in one of "
        f"{', '.join(BLOCKS)}, F16 or BF16."
    )


def _bytes(info: Info, kind: str, per_block: int, block_bytes: int) -> int:
    """Bytes that a tensor takes. Raises Damaged if its rows are not whole blocks."""
    if per_block > 1 and (not info.sides or info.sides[0] % per_block):
        raise Damaged(f"the rows of {quote(info.name)} are no whole blocks of {per_block} values, as {kind} has them")
    return prod(info.sides) // per_block * block_bytes


def _shape(info: Info, header: Header) -> tuple[int, ...]:
    """The shape in torch's order; where ComfyUI's converter made rows of 256 of a tensor, the one before that."""
    shape = tuple(reversed(info.sides))
    original = header.metadata.get(_ORIGINAL_SHAPE + info.name)
    if original is None:
        return shape
    sides = tuple(original) if isinstance(original, list) else ()
    if any(type(side) is not int or side < 1 for side in sides) or prod(sides) != prod(shape):
        raise Damaged(f"{quote(info.name)} of {list(shape)} was {quote(str(original), 80)} before, it says")
    return sides


def _check_places(places: list[tuple[int, int, str]], size: int) -> None:
    """`places`: first byte, byte after the last, name. Raises Damaged if one ends beyond the file or in another one."""
    end, before = 0, ""
    for first, after, name in sorted(places):
        if after > size:
            raise Damaged(f"{quote(name)} does not lie inside of it")
        if first < end:
            raise Damaged(f"{quote(before)} and {quote(name)} lie in the same place")
        if after > first:
            end, before = after, name
