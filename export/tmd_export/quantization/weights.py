"""Weights of linear layers as int8 or fp8 with a scale per output channel, rounded while they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..weights.weights import CHUNK_BYTES, Weights
from .formats import Format

VALUES, SCALES = ".quantized", ".scale"


class QuantizedWeights:
    """What `storage` asks of `Weights`, with values and scales in the place of some matrices `[K, N]`."""

    def __init__(self, weights: Weights, formats: Mapping[str, Format]) -> None:
        """`formats`: name of a quantized weight, in its layout -> its format."""
        self._weights, self._formats = weights, formats
        self._latest: tuple[str, Tensor] | None = None  # scales are asked for twice in a row

    def __contains__(self, name: str) -> bool:
        return self._split(name)[0] in self._weights

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """See `Weights.form`. Scales have the type of the products, so that what is dequantized needs no cast."""
        weight, kind = self._split(name)
        shape, dtype = self._weights.form(weight)
        if kind is None:
            return shape, dtype
        return (shape, self._formats[weight].dtype) if kind == VALUES else (shape[1:], dtype)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """See `Weights.chunks`. A channel's largest value becomes the largest of the format, others the nearest."""
        weight, kind = self._split(name)
        if kind is None:
            yield from self._weights.chunks(name)
            return
        scales = self._scales(weight)
        if kind == SCALES:
            yield scales
            return
        for piece in self._pieces(weight):
            yield self._formats[weight].round(piece / scales.float()).contiguous()

    def _scales(self, weight: str) -> Tensor:
        if self._latest is None or self._latest[0] != weight:
            largest = torch.stack([piece.abs().amax(0) for piece in self._pieces(weight)]).amax(0)
            scales = torch.where(largest > 0, largest / self._formats[weight].largest, 1.0)
            self._latest = weight, scales.to(self._weights.form(weight)[1])
        return self._latest[1]

    def _pieces(self, weight: str) -> Iterator[Tensor]:
        matrix = self._weights.laid_out(weight)
        rows = max(1, CHUNK_BYTES // (4 * matrix.shape[1]))
        for start in range(0, matrix.shape[0], rows):
            yield matrix[start : start + rows].float()

    def _split(self, name: str) -> tuple[str, str | None]:
        for kind in (VALUES, SCALES):
            weight = name.removesuffix(kind)
            if weight != name and weight in self._formats:
                return weight, kind
        return name, None
