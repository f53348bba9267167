"""Latents -> frames, one latent frame at a time, so that a video of any length needs the memory of a few frames.

The first latent frame becomes one picture, each later one `temporal_stride` pictures; between them the decoder's
convolutions remember their last inputs in caches, which two sets of buffers pass back and forth.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..clock import Timings, check_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tmd_engines import Engine


class ChunkDecoder:
    """Decoder graphs bound to buffers for latent frames of `height` x `width`."""

    def __init__(self, first: Engine, height: int, width: int) -> None:
        self._dims = {"batch": 1, "frames": 1, "height": height, "width": width}
        self._latents = first.empty("latents", **self._dims)
        self._first_frames = first.empty("frames", **self._dims)
        names = [name for name in first.outputs if name.startswith("cache_")]
        self._caches = [{name: first.empty(name, **self._dims) for name in names}]
        self._magnitude = first.empty("magnitude", **self._dims)
        made = {"frames": self._first_frames, "magnitude": self._magnitude}
        self._first = first.bind({"latents": self._latents}, {**made, **self._caches[0]})
        self._turns: list[Callable[[], object]] = []
        self._step_frames = self._first_frames

    def _bind_step(self, step: Engine) -> None:
        self._caches.append({name: step.empty(name, **self._dims) for name in self._caches[0]})
        self._step_frames = step.empty("frames", **self._dims)
        made = {"frames": self._step_frames, "magnitude": self._magnitude}
        for now, after in ((0, 1), (1, 0)):
            outputs = {f"{name}_next": buffer for name, buffer in self._caches[after].items()}
            self._turns.append(step.bind({"latents": self._latents, **self._caches[now]}, {**made, **outputs}))

    def chunks(
        self, latents: NDArray[Any], load_step: Callable[[], Engine], timings: Timings
    ) -> Iterator[NDArray[np.uint8]]:
        """uint8 `[F, 8·height, 8·width, 3]` for each of T `latents` `[1, C, T, height, width]`, the caller's own.

        `load_step` gives the engine of the later frames when a second latent frame first comes: a single picture does
        not need it.
        """
        total = latents.shape[2]
        check_finite("denoise", latents)
        for k in range(total):
            if k and not self._turns:
                self._bind_step(load_step())
            start = perf_counter()
            self._latents[...] = latents[:, :, k : k + 1]
            if k:
                self._turns[(k - 1) % 2]()
            else:
                self._first()
            check_finite("decode", np.asarray(self._magnitude))  # in uint8 a NaN could not be seen any more
            frames = np.array(self._step_frames if k else self._first_frames)[0]
            seconds = perf_counter() - start
            timings.add("decode", seconds)
            timings.report("decode", k + 1, total, seconds)
            yield frames
