"""What formats of small blocks share: the order in which cuBLAS wants the scales."""

from __future__ import annotations

from torch import Tensor


def unswizzled(scales: Tensor, rows: int, groups: int) -> Tensor:
    """Scales `[rows, groups]` out of the order of cuBLAS's block scaling, where they lie in tiles of 128 rows by 4.

    In a tile the row 32·a + b and the group c are at 16·b + 4·a + c; tiles follow each other along the groups. Source:
    cuBLAS documentation, "1D Block Scaling Factors Layout". `scales` may have any shape.
    """
    tiles_down, tiles_across = -(-rows // 128), -(-groups // 4)
    tiles = scales.reshape(tiles_down, tiles_across, 32, 4, 4)  # [.., .., b, a, c]
    return tiles.permute(0, 3, 2, 1, 4).reshape(tiles_down * 128, tiles_across * 4)[:rows, :groups].contiguous()
