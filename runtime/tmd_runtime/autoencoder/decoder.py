"""Latents -> frames, one latent frame at a time, so that a video of any length needs the memory of a few frames.

The first latent frame becomes one picture, each later one `temporal_stride` pictures; between them the decoder's
convolutions remember their last inputs in caches, which two sets of buffers pass back and forth.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..clock import Timings, check_finite
from ..errors import RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from tmd_engines import Engine
    from tmd_engines.bundle.manifest import LatentInfo


class ChunkDecoder:
    """Decoder graphs bound to buffers for latent frames of `height` x `width`, in latent units of `geometry`."""

    def __init__(self, first: Engine, geometry: LatentInfo, height: int, width: int) -> None:
        self._dims = {"batch": 1, "frames": 1, "height": height, "width": width}
        self._geometry = geometry
        self._latents = first.empty("latents", **self._dims)
        self._first_frames = self._frames(first, 1)
        names = [name for name in first.outputs if name.startswith("cache_")]
        self._caches = [{name: first.empty(name, **self._dims) for name in names}]
        self._first = first.bind({"latents": self._latents}, {"frames": self._first_frames, **self._caches[0]})
        self._turns: list[Callable[[], object]] = []
        self._step_frames = self._first_frames

    def _frames(self, engine: Engine, count: int) -> NDArray[np.uint8]:
        frames: NDArray[np.uint8] = engine.empty("frames", **self._dims)
        stride = self._geometry.spatial_stride
        wanted = (1, count, self._dims["height"] * stride, self._dims["width"] * stride, 3)
        if frames.shape != wanted or frames.dtype.name != "uint8":
            raise RuntimeFailure(
                f"the graph {engine.graph} of this bundle makes {frames.dtype} {list(frames.shape)} where its manifest "
                f"promises uint8 {list(wanted)}. Export the bundle again."
            )
        return frames

    def _bind_step(self, step: Engine) -> None:
        wanted = {name: buffer.shape for name, buffer in self._caches[0].items()}
        read = {name: spec.resolve(**self._dims) for name, spec in step.inputs.items() if name != "latents"}
        written = {
            name.removesuffix("_next"): spec.resolve(**self._dims)
            for name, spec in step.outputs.items()
            if name != "frames"
        }
        if not wanted == read == written:
            raise RuntimeFailure(
                "the graphs decoder_first and decoder_step of this bundle do not pass the same caches: they come from "
                "different exports. Export the bundle again."
            )
        self._caches.append({name: step.empty(name, **self._dims) for name in wanted})
        self._step_frames = self._frames(step, self._geometry.temporal_stride)
        for now, after in ((0, 1), (1, 0)):
            outputs = {f"{name}_next": buffer for name, buffer in self._caches[after].items()}
            self._turns.append(
                step.bind({"latents": self._latents, **self._caches[now]}, {"frames": self._step_frames, **outputs})
            )

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
            # NaN has no face in uint8. The last cache is the input of the last convolution: what went wrong before
            # shows there.
            caches = self._caches[k % 2]
            if caches:
                check_finite("decode", caches[max(caches)])
            frames = (self._step_frames if k else self._first_frames)[0].copy()
            seconds = perf_counter() - start
            timings.add("decode", seconds)
            timings.report("decode", k + 1, total, seconds)
            yield frames
