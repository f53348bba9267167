"""The matrix by which ConvRot rotates groups of columns (arXiv 2512.03673, theorem 3.3)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

_LARGEST = 4096


def is_power_of_four(size: Any) -> bool:
    """Whether there is such a matrix of this size, and not too large a one."""
    return type(size) is int and 4 <= size <= _LARGEST and size.bit_count() == 1 and size.bit_length() % 2 == 1


@cache
def hadamard(size: int) -> Tensor:
    """The regular Hadamard matrix `[size, size]`, orthonormal and symmetric, so that it is its own inverse. float32.

    Kronecker powers of the 4 by 4 matrix whose second diagonal is −1 and all else 1, over the root of the size.
    """
    small = 1 - 2 * torch.eye(4).flip(0)
    result = small
    while len(result) < size:
        result = torch.kron(result, small)
    return result / size**0.5
