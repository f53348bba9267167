"""Gaussian noise equal to torch's seeded CPU generator, without torch.

Not a general random library: one stream of float32 normals, drawn as `torch.randn(shape, generator=g)` draws them on
the CPU, so that a seed means the same picture here and there. Two promises, both tested:

- each value lies within 1e-6 of what torch's vectorised x86 kernels give (measured: 4.8e-7). Torch's plain kernel,
  used where there is no AVX2, rounds the angle differently and is up to 2.4e-6 away from its own vectorised ones,
  hence also from us;
- each value has the same bits on every machine and in every language: apart from integer work only IEEE 754
  operations that are exact by the standard occur (+ - * / sqrt, floor, rounding to float32), never a libm function
  and never a fused multiply-add. A C++ twin follows the lines of this file with contraction off (`-ffp-contract=off`)
  and is held to `runtime/golden/noise.txt`.

How torch draws (ATen's CPU generator and its normal kernel, found by reading and by comparing):

- MT19937 seeded with the low 32 bits of the seed;
- 16 values or more: one word per value gives u = (word mod 2^24) / 2^24. In each block of 16, value j (0..7) and
  value j+8 become r·cos θ and r·sin θ with r = sqrt(−2·log(1 − u_j)), θ = 2π·u_{j+8}. If the count is no multiple of
  16, the last 16 values are drawn once more with fresh words, overwriting what the whole blocks left there;
- below 16: one value at a time in double precision. Two words give u = (64 bits mod 2^53) / 2^53; a pair (u, v) gives
  sqrt(−2·log(1 − v))·cos(2π·u) now, and the sine is kept for the next such value, also across draws. Blocks leave the
  kept sine alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_BLOCK = 16
# Pairs worked on at once: the dozen float64 temporaries of one chunk stay in the second-level cache.
_CHUNK_BLOCKS = 1024

# log m = 2·(s + s³/3 + s⁵/5 + ...), s = (m − 1)/(m + 1): with m in [√½, √2) the term s²²/23 is below 2^-58.
_LOG_COEFFICIENTS = [1.0 / (2 * k + 1) for k in range(11)]
# Taylor on |x| <= π/4: the first terms left out are below 2^-54.
_SIN_COEFFICIENTS = [(-1.0) ** k / math.factorial(2 * k + 1) for k in range(9)]
_COS_COEFFICIENTS = [(-1.0) ** k / math.factorial(2 * k) for k in range(9)]
# Constants in two pieces: the first has at least 20 trailing zero bits, so that its product with a small integer is
# exact.
_LN2_HIGH, _LN2_LOW = float.fromhex("0x1.62e42fee00000p-1"), float.fromhex("0x1.a39ef35793c76p-33")
_HALF_PI_HIGH, _HALF_PI_LOW = float.fromhex("0x1.921fb54400000p+0"), float.fromhex("0x1.0b4611a626331p-34")
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_TWO_PI = float.fromhex("0x1.921fb54442d18p+2")
_SQRT2_MANTISSA = 0x6A09E667F3BCD
_ONE_EXPONENT = 0x3FF


def _polynomial(x: Float64, coefficients: Sequence[float]) -> Float64:
    """Horner's rule, highest power first; the order of operations is part of the promise."""
    result = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result *= x
        result += coefficient
    return result


def exact_log(x: Float64) -> Float64:
    """Natural logarithm of normal positive float64 values, same bits everywhere, within 2 ulp."""
    bits = x.view(np.int64)
    mantissa = bits & 0xFFFFFFFFFFFFF
    # A mantissa of √2 or more is halved, so that m lies around 1 and log m loses no digits near x = 1.
    halve = (mantissa >= _SQRT2_MANTISSA).astype(np.int64)
    exponent = (bits >> 52) - _ONE_EXPONENT + halve
    m = (mantissa | ((_ONE_EXPONENT - halve) << 52)).view(np.float64)
    s = (m - 1.0) / (m + 1.0)
    log_m = (s + s) * _polynomial(s * s, _LOG_COEFFICIENTS)
    e = exponent.astype(np.float64)
    return e * _LN2_HIGH + (e * _LN2_LOW + log_m)


def exact_sin_cos(angle: Float64) -> tuple[Float64, Float64]:
    """Sine and cosine of float64 angles in 0..2π (radians), same bits everywhere, absolute error below 1e-15."""
    quarter = np.floor(angle * _TWO_OVER_PI + 0.5)
    x = (angle - quarter * _HALF_PI_HIGH) - quarter * _HALF_PI_LOW
    x2 = x * x
    sine = x * _polynomial(x2, _SIN_COEFFICIENTS)
    cosine = _polynomial(x2, _COS_COEFFICIENTS)
    turn = quarter.astype(np.int64) & 3
    odd = (turn & 1).astype(bool)
    sin_out, cos_out = np.where(odd, cosine, sine), np.where(odd, sine, cosine)
    np.negative(sin_out, out=sin_out, where=turn >= 2)
    np.negative(cos_out, out=cos_out, where=(turn == 1) | (turn == 2))
    return sin_out, cos_out


class NoiseStream:
    """The normals of successive `torch.randn(..., generator=g)` calls, where g is a CPU generator seeded once.

    `seed` is an integer in 0..2^64−1. Torch's CPU generator uses the low 32 bits only, so do we: seeds that differ by
    a multiple of 2^32 give the same noise. Raises ValueError for anything else (torch also takes negative seeds and
    wraps them; we do not).
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise ValueError(f"the seed must be a whole number from 0 to 2^64-1, not {seed!r}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"the seed {seed} is out of range: choose a whole number from 0 to 2^64-1")
        self.seed = int(seed)
        self._words = _mersenne_twister(self.seed & 0xFFFFFFFF)
        self._kept_sine: float | None = None

    def normal(self, shape: int | Sequence[int], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """One draw of standard normals, float32 `shape`; written into `out` (C-contiguous, that shape) if given.

        Draws are made one after the other: two draws of 8 are not one draw of 16, in torch neither.
        """
        shape = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous float32 {shape}, not {out.dtype} {out.shape}")
        flat = out.reshape(-1)
        if flat.size >= _BLOCK:
            self._fill_blocks(flat)
        elif flat.size:
            flat[:] = np.fromiter(self._singles(flat.size), np.float64, flat.size)
        return out

    def _fill_blocks(self, flat: NDArray[np.float32]) -> None:
        whole = flat.size // _BLOCK
        for start in range(0, whole, _CHUNK_BLOCKS):
            count = min(_CHUNK_BLOCKS, whole - start)
            words = self._words.random_raw(count * _BLOCK)
            flat[start * _BLOCK : (start + count) * _BLOCK] = _box_muller_blocks(words).reshape(-1)
        rest = flat.size - whole * _BLOCK
        if rest:
            # Torch draws a uniform for every value first, the incomplete block included, and only then the 16 for the
            # tail.
            self._words.random_raw(rest)
            flat[-_BLOCK:] = _box_muller_blocks(self._words.random_raw(_BLOCK)).reshape(-1)

    def _singles(self, count: int) -> Iterator[float]:
        for _ in range(count):
            if self._kept_sine is not None:
                value, self._kept_sine = self._kept_sine, None
                yield value
                continue
            words = self._words.random_raw(4)
            u, v = (((int(high) << 32 | int(low)) & ((1 << 53) - 1)) * 2.0**-53 for high, low in (words[:2], words[2:]))
            radius = np.sqrt(-2.0 * exact_log(np.array([1.0 - v])))
            sine, cosine = exact_sin_cos(np.array([_TWO_PI * u]))
            self._kept_sine = float((radius * sine)[0])
            yield float((radius * cosine)[0])


def _box_muller_blocks(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Normals `[blocks, 16]` float32 from `blocks`·16 generator words."""
    # u = k/2^24; 1 − u is exact in float64 and in float32 alike.
    uniform = (words & 0xFFFFFF).astype(np.float64).reshape(-1, 2, 8) * 2.0**-24
    radius = np.sqrt(-2.0 * exact_log(1.0 - uniform[:, 0]))
    # Torch's angle is a float32 product; following its rounding here is what keeps the far tails (r up to 5.8) within
    # 1e-6.
    angle = uniform[:, 1].astype(np.float32) * np.float32(_TWO_PI)
    sine, cosine = exact_sin_cos(angle.astype(np.float64))
    normals = np.empty((len(uniform), 2, 8), np.float32)
    normals[:, 0] = radius * cosine
    normals[:, 1] = radius * sine
    return normals.reshape(-1, _BLOCK)


def _mersenne_twister(seed: int) -> np.random.MT19937:
    """MT19937 as its authors' `init_genrand(seed)` leaves it, which is torch's seeding and not numpy's own."""
    key = [seed]
    for i in range(1, 624):
        key.append((1812433253 * (key[-1] ^ (key[-1] >> 30)) + i) & 0xFFFFFFFF)
    generator = np.random.MT19937(0)
    generator.state = {"bit_generator": "MT19937", "state": {"key": np.array(key, np.uint32), "pos": 624}}
    return generator
