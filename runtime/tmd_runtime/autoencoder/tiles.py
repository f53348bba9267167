"""A still that is too large for the memory of its decoder, or of its encoder, taken tile by tile (tmd_engines.cost).

Where two tiles overlap, one fades into the other: a decoder that looks at the whole of its picture (DC-AE) gives each
tile a slightly different look, and seams would show.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines.cost.tiling import tile_starts

from ..clock import Timings

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from .decoder import ChunkDecoder


def decode_tiles(
    decoder: ChunkDecoder, latents: NDArray[Any], tile: tuple[int, int], stride: int, timings: Timings
) -> NDArray[np.uint8]:
    """uint8 `[1, H, W, 3]` of a still's latents `[1, C, 1, h, w]`, with a decoder bound to tiles of `tile` latents."""
    height, width = latents.shape[3:]
    tops, lefts = tile_starts(height, tile[0], stride), tile_starts(width, tile[1], stride)
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


def encode_tiles(
    encode: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    picture: NDArray[np.uint8],
    tile: tuple[int, int],
    stride: int,
    channels: int,
) -> NDArray[np.float32]:
    """Latents `[1, C, 1, h, w]` of a `picture` `[H, W, 3]`; `encode` makes those of a part of `tile` latents."""
    height, width = (side // stride for side in picture.shape[:2])
    tops, lefts = tile_starts(height, tile[0], stride), tile_starts(width, tile[1], stride)
    whole = np.empty((height, width, channels), np.float32)
    for row, top in enumerate(tops):
        strip = np.empty((tile[0], width, channels), np.float32)
        for column, left in enumerate(lefts):
            cut = picture[top * stride : (top + tile[0]) * stride, left * stride : (left + tile[1]) * stride]
            part = encode(cut)[0, :, 0].transpose(2, 1, 0)
            _fade(strip.swapaxes(0, 1), part, left, lefts[column - 1] + tile[1] if column else 0)
        _fade(whole, strip, top, tops[row - 1] + tile[0] if row else 0)
    return np.ascontiguousarray(whole.transpose(2, 0, 1))[None, :, None]


def _fade(whole: NDArray[Any], part: NDArray[Any], start: int, done: int) -> None:
    """Puts `part` into `whole` from row `start` on, fading over the rows that are there already, up to `done`."""
    shared = max(done - start, 0)
    share = ((np.arange(shared, dtype=np.float32) + 0.5) / max(shared, 1))[:, None, None]
    mixed = whole[start : start + shared] * (1 - share) + part[:shared] * share
    whole[start : start + shared] = np.round(mixed) if whole.dtype == np.uint8 else mixed
    whole[start + shared : start + len(part)] = part[shared:]


def _no_later_frame() -> Any:
    raise AssertionError("a still has one latent frame")
