"""Writes `noise.txt`, the golden values of the noise stream (run: `python runtime/golden/make_noise.py`).

The values must never change: a changed file means that old seeds no longer give the old videos. It is written again
only to add cases.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tmd_runtime.sampling.noise import NoiseStream

FILE = Path(__file__).with_name("noise.txt")

HEADER = """\
# Golden values of the noise stream (tmd_runtime/sampling/noise.py), as bits, for every implementation.
#
# Tokens are separated by white space; from '#' to the end of a line is a comment. Three commands:
#   stream SEED        start a new stream; SEED is decimal, 0..2^64-1
#   draw COUNT H...    draw COUNT normals; COUNT tokens follow, each value's float32 bits as 8 hex digits
#   hash COUNT H       draw COUNT normals; H is FNV-1a (64 bit, 16 hex digits) over their bytes (float32,
#                      little-endian, in order)
# The draws below one `stream` are made one after the other on the same stream: order matters.
"""

# Below 16, at 16, no multiple of 16, several draws with and without a kept sine between them, and full-size latents.
CASES: list[tuple[int, list[int]]] = [
    (0, [16]),
    (42, [1, 1, 3, 16, 2, 17, 31, 1, 15]),
    (42, [48, 100]),
    (1234567890123, [5, 33, 7]),
    (2**32 - 1, [20]),
    (2**64 - 1, [20]),
    (7, [16 * 5 * 8 * 8, 16 * 5 * 8 * 8, 9, 1_000_003]),
    (2024, [16 * 21 * 60 * 104]),
]
LARGEST_LISTED = 100


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def golden_text() -> str:
    lines = [HEADER]
    for seed, counts in CASES:
        stream = NoiseStream(seed)
        lines.append(f"stream {seed}")
        for count in counts:
            bits = stream.normal(count).view(np.uint32)
            if count > LARGEST_LISTED:
                lines.append(f"hash {count} {fnv1a(bits.astype('<u4').tobytes()):016x}")
                continue
            lines.append(f"draw {count}")
            lines += ["  " + " ".join(f"{b:08x}" for b in bits[i : i + 8]) for i in range(0, count, 8)]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    FILE.write_text(golden_text(), encoding="ascii")
    print(f"wrote {FILE}")
