"""NVFP4 in numpy: what a value becomes in blocks of 16, bit by bit. Weights are written by it, and graphs held to it.

A value is  code · block scale · tensor scale:

    code          E2M1: sign, two bits of exponent, one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6
    block scale   E4M3, one for 16 values that lie together: their largest absolute value, divided by 6
    tensor scale  float32, one for all: the largest absolute value, divided by 6 · 448, which is E4M3's largest

(NVIDIA, "Working with Quantized Types" in TensorRT's documentation; E2M1 is that of OCP's Microscaling Formats.)
Here the tensor scale is the next power of two from there on. Then a block scale times the tensor scale has 4 bits of
mantissa, and a value 6, so that bfloat16 holds both, and what is rounded is the format and nothing else. The cost is
one of the 15 binades of E4M3.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tmd_engines.bundle.float4 import BLOCK, LARGEST, VALUES

LARGEST_SCALE = 448.0
LEAST_DIVISOR = 2.0**-126  # for blocks whose scale is zero: their values are zero, whatever they are divided by
_VALUES = np.array(VALUES, np.float32)

Floats = NDArray[np.float32]


def tensor_scale(largest: float) -> float:
    """The scale of a tensor whose largest absolute value is this; a power of two."""
    exact = largest / (LARGEST * LARGEST_SCALE)
    return 2.0 ** max(-126, math.ceil(math.log2(exact))) if exact > 0 else 1.0


def encode(values: Floats) -> NDArray[np.uint8]:
    """Codes of the nearest values of E2M1; of two that are as near, the one with an even code. Ends saturate."""
    size = np.abs(values)
    # From 0 to 2 the values are 0.5 apart, from 2 to 4 they are 1 apart, and from 4 to 6, 2.
    apart = np.where(size < 2, np.float32(0.5), np.where(size < 4, np.float32(1), np.float32(2)))
    first = np.where(size < 2, 0, np.where(size < 4, 2, 4))  # codes of even values are even multiples of each step
    near = np.minimum(np.rint(size / apart) + first, 7).astype(np.uint8)
    return near | (np.signbit(values).astype(np.uint8) << 3)


def block_scales(largest: Floats, scale: float) -> NDArray[np.uint8]:
    """Codes of the E4M3 scales of blocks with these largest absolute values, in a tensor of this scale."""
    exact = largest / np.float32(LARGEST) / np.float32(scale)
    return np.minimum(exact, np.float32(LARGEST_SCALE)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def quantize(values: Floats, scale: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes `[..., K]` and codes of the block scales `[..., K/16]` of float32 values, in blocks of the last axis."""
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    scales = block_scales(np.abs(blocks).max(-1), scale)
    divisors = np.maximum(decode_scales(scales) * np.float32(scale), np.float32(LEAST_DIVISOR))
    return encode(blocks / divisors[..., None]).reshape(values.shape), scales


def dequantize(codes: NDArray[np.uint8], scales: NDArray[np.uint8], scale: float) -> Floats:
    """The values that these codes stand for."""
    blocks = _VALUES[codes].reshape(*codes.shape[:-1], -1, BLOCK)
    wide = (decode_scales(scales) * np.float32(scale))[..., None]
    found: Floats = (blocks * wide).reshape(codes.shape)
    return found


def decode_scales(scales: NDArray[np.uint8]) -> Floats:
    """The values of E4M3 codes."""
    found: Floats = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return found


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two codes to a byte, the first in its low bits, as ONNX stores them. Their number is even."""
    flat = codes.reshape(-1, 2)
    return (flat[:, 0] | (flat[:, 1] << 4)).astype(np.uint8)
