"""Tensors of files by name: shapes and types from the headers, values mapped from the disk one at a time.

Nothing is opened here; `tensors` does that. A weight that its file does not store as floating point (`storage`) is
worked out when it is asked for.
"""

from __future__ import annotations

import errno
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tmd_engines.errors import quote

from ..errors import ExportError


@dataclass(frozen=True)
class Entry:
    """Shape and dtype (torch's name for it, or safetensors' own where torch has none) of a tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: byte of its first element in `file`, and steps in elements along its dimensions."""

    file: Path
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Codes:
    """A matrix as small numbers: row r means values[r]·scales[r]. `values` `[rows, columns]` in int8 or fp8 as they are
    stored, `scales` `[rows]` in float32."""

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class Packed:
    """A weight that one or more stored tensors make up.

    `entry` is what `read` gives. `format` names the storage format in a message; `parts` are the stored tensors.
    `codes`, of a format that has them, gives the weight as it is stored.
    """

    entry: Entry
    format: str
    parts: tuple[str, ...]
    read: Callable[[], Tensor]
    codes: Callable[[], Codes] | None = None


class Tensors:
    """What some files hold: `entries` by name, the `files`, their `metadata` (safetensors, GGUF), and the name of the
    dictionary inside of the file that the tensors were found in, `wrapper`. `beside`: files next to them that say how
    they are stored. `formats`: storage format -> number of weights that are worked out from it."""

    def __init__(self, files: Sequence[Path], metadata: dict[str, str], wrapper: str | None = None) -> None:
        self.files, self.metadata, self.wrapper = tuple(files), metadata, wrapper
        self.beside: tuple[Path, ...] = ()
        self.formats: Counter[str] = Counter()
        self.entries: dict[str, Entry] = {}
        self._stored: dict[str, tuple[Entry, Place]] = {}
        self._packed: dict[str, Packed] = {}

    def add(self, name: str, entry: Entry, place: Place) -> None:
        """Raises ExportError if there is one of that name."""
        if name in self._stored:
            other = self._stored[name][1].file
            raise ExportError(
                f"{quote(name)} is in {other.name} and in {place.file.name} of {place.file.parent}: "
                "the shards do not belong together. Copy all of them again from one place."
            )
        self.entries[name], self._stored[name] = entry, (entry, place)

    def pack(self, weights: dict[str, Packed], rest: Iterable[str] = ()) -> None:
        """Puts `weights` in the place of the stored tensors that they are made of; `rest` are tensors without use."""
        for name in {*rest, *(part for weight in weights.values() for part in weight.parts)}:
            self.entries.pop(name, None)
        for name, weight in weights.items():
            self.entries[name], self._packed[name] = weight.entry, weight
            self.formats[weight.format] += 1

    def file_of(self, name: str) -> Path | None:
        """The file that a stored tensor lies in; None if there is none of that name."""
        return self._stored[name][1].file if name in self._stored else None

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU: as it is stored, its memory mapped from the file, or worked out from what is
        stored. KeyError if there is none. Raises ExportError if the file changed or its scales make no numbers."""
        self.entries[name]
        return self._packed[name].read() if name in self._packed else self.read_stored(name)

    def codes(self, name: str) -> Codes | None:
        """The weight `name` as small numbers and scales, if it is stored so and all of them are numbers. KeyError if
        there is none of that name."""
        self.entries[name]
        packed = self._packed.get(name)
        if packed is None or packed.codes is None:
            return None
        found = packed.codes()
        values, scales = found.values, found.scales
        is_matrix = values.ndim == 2 and scales.shape == values.shape[:1]
        # Of the types that are kept none has an Inf.
        return found if is_matrix and not torch.isnan(values).any() and (scales > 0).all() else None

    def read_stored(self, name: str) -> Tensor:
        """A tensor as it is stored, also one that is only part of a weight.

        A mapping of its own for each tensor: with the tensor go its pages, and no machine refuses to map a file that is
        larger than its memory (as Linux does for the copy-on-write mapping of a whole file, which torch makes).
        """
        entry, place = self._stored[name]
        dtype = getattr(torch, entry.dtype)
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=dtype)
        count, size = span(entry.shape, place.stride), dtype.itemsize
        start = place.offset - place.offset % mmap.ALLOCATIONGRANULARITY
        inside = place.offset - start
        try:
            with open(place.file, "rb") as file:
                mapped = mmap.mmap(file.fileno(), inside + count * size, access=mmap.ACCESS_COPY, offset=start)
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) == errno.ENOMEM:
                raise MemoryError(f"{quote(name)} of {place.file} cannot be mapped") from None
            raise ExportError(f"{place.file} changed while it was read ({one_line(error)}): start again.") from None
        if place.offset % size:
            mapped, inside = bytearray(mapped[inside:]), 0  # type: ignore[assignment]
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=inside)
        return flat.as_strided(entry.shape, place.stride)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Steps in elements of a tensor without gaps."""
    strides, step = [], 1
    for side in reversed(shape):
        strides.append(step)
        step *= side
    return tuple(reversed(strides))


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor, both counted."""
    return 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True)) if 0 not in shape else 0


def one_line(error: Exception) -> str:
    """The message of an error without line breaks."""
    return " ".join(str(error).split())


def short(message: str) -> str:
    """The beginning of a message, printable."""
    return quote(message, 200)[1:-1]
