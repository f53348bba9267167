"""Weights of linear layers in the formats of their layers, rounded while they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..weights.weights import CHUNK_BYTES, Weights
from .format import Format

_ROWS = 16  # blocks of values go along the rows, and no piece ends within one


class QuantizedWeights:
    """What `storage` asks of `Weights`, with the parts of their formats in the place of some matrices `[K, N]`."""

    def __init__(self, weights: Weights, formats: Mapping[str, Format]) -> None:
        """`formats`: name of a quantized weight, in its layout -> its format."""
        self._weights, self._formats = weights, formats
        self._latest: tuple[str, Any] | None = None  # scales are asked for several times in a row

    def __contains__(self, name: str) -> bool:
        return self._split(name)[0] in self._weights

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """See `Weights.form`."""
        weight, part = self._split(name)
        shape, dtype = self._weights.form(weight)
        return (shape, dtype) if part is None else self._formats[weight].parts(shape, dtype)[part]

    def chunks(self, name: str) -> Iterator[Tensor]:
        """See `Weights.chunks`."""
        weight, part = self._split(name)
        if part is None:
            yield from self._weights.chunks(name)
            return
        kept = self._kept(weight, part)
        if kept is not None:
            yield from (piece.contiguous() for piece in kept.split(self._rows(kept))) if kept.ndim == 2 else [kept]
            return
        yield from self._formats[weight].chunks(part, self._pieces(weight), self._scales(weight))

    def _kept(self, weight: str, part: str) -> Tensor | None:
        """A part as the checkpoint has it, so that numbers of this format are not rounded a second time."""
        codes = self._weights.codes(weight)
        return None if codes is None else self._formats[weight].kept(part, codes, self._weights.form(weight)[1])

    def _scales(self, weight: str) -> Any:
        if self._latest is None or self._latest[0] != weight:
            found = self._formats[weight].scales(self._pieces(weight), self._weights.form(weight)[1])
            self._latest = weight, found
        return self._latest[1]

    def _pieces(self, weight: str) -> Iterator[Tensor]:
        matrix = self._weights.laid_out(weight)
        rows = self._rows(matrix)
        for start in range(0, matrix.shape[0], rows):
            yield matrix[start : start + rows].float()

    @staticmethod
    def _rows(matrix: Tensor) -> int:
        """Of a piece."""
        return max(1, CHUNK_BYTES // (4 * matrix.shape[1] * _ROWS)) * _ROWS

    def _split(self, name: str) -> tuple[str, str | None]:
        stem, dot, ending = name.rpartition(".")
        known = self._formats.get(stem)
        if known is None or dot + ending not in known.parts(*self._weights.form(stem)):
            return name, None
        return stem, dot + ending
