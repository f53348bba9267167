"""A still that is too large for its decoder's memory, decoded tile by tile.

All tiles have one size, so that the decoder is bound once. Where two overlap, one fades into the other: a decoder that
looks at the whole of its picture (DC-AE) gives each tile a slightly different look, and seams would show.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .loop import Timings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .decoder import ChunkDecoder

TILE_PIXELS = 1536  # DC-AE's widest layer, 128 channels in float32, is 1.2 GB of it
OVERLAP_PIXELS = 256


def tile_size(height: int, width: int, stride: int) -> tuple[int, int]:
    """Height and width of a tile, in latents, for a picture of that many latents of `stride` pixels."""
    return min(height, TILE_PIXELS // stride), min(width, TILE_PIXELS // stride)


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `side`, each at least `overlap` into the one before. In latents."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return [round(k * (side - tile) / (count - 1)) for k in range(count)]


def decode_tiles(
    decoder: ChunkDecoder, latents: NDArray[Any], tile: tuple[int, int], stride: int, timings: Timings
) -> NDArray[np.uint8]:
    """uint8 `[1, H, W, 3]` of a still's latents `[1, C, 1, h, w]`, with a decoder bound to tiles of `tile` latents."""
    height, width = latents.shape[3:]
    overlap = OVERLAP_PIXELS // stride
    tops, lefts = (tile_starts(*sides, overlap) for sides in ((height, tile[0]), (width, tile[1])))
    picture = np.empty((height * stride, width * stride, 3), np.uint8)
    silent = Timings(seconds=timings.seconds)
    for row, top in enumerate(tops):
        strip = np.empty((tile[0] * stride, width * stride, 3), np.uint8)
        for column, left in enumerate(lefts):
            start = perf_counter()
            cut = latents[:, :, :, top : top + tile[0], left : left + tile[1]]
            (frames,) = decoder.chunks(cut, _no_later_frame, silent)
            done = (lefts[column - 1] + tile[1]) * stride if column else 0
            _fade(strip.swapaxes(0, 1), frames[0].swapaxes(0, 1), left * stride, done)
            number = row * len(lefts) + column + 1
            timings.report("decode", number, len(tops) * len(lefts), perf_counter() - start)
        _fade(picture, strip, top * stride, (tops[row - 1] + tile[0]) * stride if row else 0)
    return picture[None]


def _fade(whole: NDArray[np.uint8], part: NDArray[np.uint8], start: int, done: int) -> None:
    """Puts `part` into `whole` from row `start` on, fading over the rows that are there already, up to `done`."""
    shared = max(done - start, 0)
    share = ((np.arange(shared, dtype=np.float32) + 0.5) / max(shared, 1))[:, None, None]
    mixed = whole[start : start + shared] * (1 - share) + part[:shared] * share
    whole[start : start + shared] = np.round(mixed)
    whole[start + shared : start + len(part)] = part[shared:]


def _no_later_frame() -> Any:
    raise AssertionError("a still has one latent frame")
