"""The header of a GGUF file: strings of its metadata, and what it says of each tensor. No value is read.

The file is untrusted, and the library's own reader trusts it: a wrong count keeps it busy without end, a wrong length
moves all that follows. Here each number is compared with the size of the file before it is used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tmd_engines.errors import quote

from ..errors import ExportError

_MAX_HEADER = 128 << 20  # bytes; the vocabulary of UMT5 takes 6 MB of it
_MAX_TENSORS = 1 << 16  # Wan 14B has 1095
_MAX_SIDES = 8  # dimensions of a tensor; ggml itself has 4, and Wan's patch embedding 5
_MAX_DEPTH = 4  # of arrays in arrays
_MAX_KEPT = 1 << 16  # bytes of a string that is kept
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Info:
    """What the header says of a tensor: its sides in ggml's order (the fastest first), the number of its type, and
    the byte of the file at which it begins."""

    name: str
    sides: tuple[int, ...]
    type: int
    first: int


@dataclass(frozen=True)
class Header:
    """`metadata`: strings, numbers and short lists of numbers. `size`: bytes of the file."""

    metadata: dict[str, Any]
    infos: tuple[Info, ...]
    size: int


class Damaged(Exception):
    """Something that a GGUF file cannot say; the message ends up in "is not a complete GGUF file (...)"."""


def read_header(path: Path) -> Header:
    """Raises Damaged if the header is not one or goes on beyond the file, ExportError if the file cannot be read."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data, min(len(data), _MAX_HEADER))
            metadata, infos = _parse(cursor)
            step = _alignment(metadata)
            start = -(-cursor.at // step) * step
            for info in infos:
                if info.first % step:
                    raise Damaged(f"{quote(info.name)} begins between two multiples of {step} bytes")
            placed = tuple(Info(info.name, info.sides, info.type, start + info.first) for info in infos)
            return Header(metadata, placed, len(data))
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}): check the path and its permissions.") from None
    except ValueError:  # there is nothing to map
        raise Damaged("it is empty") from None


def _alignment(metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or value < 1 or value & (value - 1) or value > 1 << 20:
        raise Damaged(f"its alignment is {value}")
    return value


class _Cursor:
    """Reads the header from front to back and never beyond `end`."""

    def __init__(self, data: Any, end: int) -> None:
        self.data, self.end, self.at = data, end, 0

    def skip(self, size: int) -> int:
        """Goes on by `size` bytes and returns where they begin."""
        at = self.at
        if size > self.end - at:
            raise Damaged(f"its header goes on beyond byte {self.end}")
        self.at += size
        return at

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str | None:
        """None for one that is too long to be of use here."""
        length = self.number("Q")
        at = self.skip(length)
        if length > _MAX_KEPT:
            return None
        return bytes(self.data[at : at + length]).decode("utf-8", "backslashreplace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A number, a string, a short list of numbers, or None for what is of no use here."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(depth)
        if kind not in _NUMBERS:
            raise Damaged(f"a value of its metadata is of type {kind}")
        return self.number(_NUMBERS[kind])

    def _array(self, depth: int) -> list[Any] | None:
        kind, count = self.number("I"), self.number("Q")
        if depth >= _MAX_DEPTH:
            raise Damaged("its metadata has arrays in arrays in arrays")
        if kind in _NUMBERS:
            if count <= _MAX_SIDES:
                return [self.number(_NUMBERS[kind]) for _ in range(count)]
            self.skip(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
            return None
        for _ in range(count):  # each takes bytes, so that a wrong count ends with the file
            if kind == _STRING:
                self.skip(self.number("Q"))
            else:
                self.value(kind, depth + 1)
        return None


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], list[Info]]:
    """The metadata and the tensors, whose places still count from the end of the header."""
    if bytes(cursor.data[cursor.skip(4) : 4]) != b"GGUF":
        raise Damaged("it does not begin with GGUF")
    version = cursor.number("I")
    if version and version & 0xFFFF == 0:
        raise Damaged("it was written for a machine with another byte order")
    if version not in _VERSIONS:
        raise Damaged(f"it is of version {version}, and versions {_VERSIONS[0]} and {_VERSIONS[1]} are read here")
    tensors, values = cursor.number("Q"), cursor.number("Q")
    if tensors > _MAX_TENSORS or values > _MAX_TENSORS:
        raise Damaged(f"it promises {tensors} tensors and {values} values of metadata")
    metadata = {}
    for _ in range(values):
        key, kind = cursor.string(), cursor.number("I")
        value = cursor.value(kind)
        if key is not None and value is not None:
            metadata[key] = value
    infos = list(_infos(cursor, tensors))
    if len({info.name for info in infos}) < len(infos):
        raise Damaged("two of its tensors have the same name")
    return metadata, infos


def _infos(cursor: _Cursor, count: int) -> Iterator[Info]:
    for _ in range(count):
        name, dims = cursor.string(), cursor.number("I")
        if name is None or dims > _MAX_SIDES:
            raise Damaged(f"a tensor has {dims} dimensions" if name is not None else "a tensor's name is too long")
        sides = tuple(cursor.number("Q") for _ in range(dims))
        if prod(side or 1 for side in sides) > 1 << 62:
            raise Damaged(f"{quote(name)} has the sides {list(sides)}")
        yield Info(name, sides, cursor.number("I"), cursor.number("Q"))
