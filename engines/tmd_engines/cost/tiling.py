"""Tiles of a still that is too large for the memory of its decoder, or of its encoder: how large they are, and where.

All tiles have one size, so that a graph is bound, or compiled, once.
"""

from __future__ import annotations

TILE_PIXELS = 1024  # 5 GB for DC-AE's decoder on ONNX Runtime; 1536 would be about twice that (docs/tim-log.md)
OVERLAP_PIXELS = 256


def tile_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Height and width of a tile, in latents, for a picture of that many latents of `stride` pixels."""
    return min(height, TILE_PIXELS // stride), min(width, TILE_PIXELS // stride)


def tile_starts(side: int, tile: int, stride: int) -> list[int]:
    """Where tiles begin that cover `side`, each as far into the one before as they overlap, or farther. In latents."""
    if side <= tile:
        return [0]
    overlap = OVERLAP_PIXELS // stride
    count = -(-(side - overlap) // (tile - overlap))
    return [round(k * (side - tile) / (count - 1)) for k in range(count)]
