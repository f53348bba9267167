"""Working out a weight some rows at a time, so that no more than its result is in memory."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

VALUES = 1 << 20  # worked out at a time: 4 MiB in float32, and a few times that in between


def by_rows(shape: tuple[int, ...], some: Callable[[slice], Tensor]) -> Tensor:
    """A weight of `shape` in bfloat16, of which `some` gives the rows of a slice in float32, rounded to nearest."""
    result = torch.empty(shape, dtype=torch.bfloat16)
    if not result.numel():
        return result
    step = max(1, VALUES // prod(shape[1:]))
    for start in range(0, shape[0], step):
        piece = slice(start, min(start + step, shape[0]))
        result[piece] = some(piece)
    return result
