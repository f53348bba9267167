"""Latents -> frames with the graphs of a bundle: whole, or a large still tile by tile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tmd_engines.cost.tiling import tile_size

from ..checks import check_latents
from .decoder import ChunkDecoder
from .tiles import decode_tiles

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from tmd_engines import Manifest

    from ..clock import Timings
    from ..graphs import Graphs


def wishes_of(latents: NDArray[Any], manifest: Manifest) -> dict[str, Any]:
    """The wishes of a run that has latents of this shape, `[1, C, T, h, w]`."""
    layout, (frames, height, width) = manifest.latents, latents.shape[2:]
    return {
        "frames": (frames - 1) * layout.temporal_stride + 1,
        "size": (width * layout.spatial_stride, height * layout.spatial_stride),
        # None is drawn any more, but a model of classes has no settings without one.
        "label": None if manifest.family.classes(manifest.model) is None else 0,
    }


class FrameDecoder:
    """The decoder of a pipeline; keeps the buffers of the latest size."""

    def __init__(self, graphs: Graphs, manifest: Manifest) -> None:
        self._graphs, self._manifest = graphs, manifest
        self._decoder: tuple[Any, ChunkDecoder] | None = None

    def __call__(self, latents: NDArray[Any], timings: Timings) -> Iterator[NDArray[np.uint8]]:
        """Frames uint8 `[f, H, W, 3]` of latents `[1, C, T, h, w]`, in pieces."""
        check_latents(latents, self._manifest.latents.channels)
        with self._graphs.stage("decoder_first"):
            stride = self._manifest.latents.spatial_stride
            is_still = self._manifest.family.makes_stills and latents.shape[2] == 1
            whole = latents.shape[3], latents.shape[4]
            key = tile_size(*whole, stride) if is_still else whole
            if self._decoder is None or self._decoder[0] != key:
                first = self._graphs.load("decoder_first", timings)
                self._decoder = None
                with timings.stage("load"):  # an engine may compile where it is bound
                    self._decoder = key, ChunkDecoder(first, *key)
            decoder = self._decoder[1]
            if key != whole:
                yield decode_tiles(decoder, latents, key, stride, timings)
            else:
                yield from decoder.chunks(latents, lambda: self._graphs.load("decoder_step", timings), timings)

    def forget(self) -> None:
        """Lets go of what is bound to engines that are about to be closed."""
        self._decoder = None
