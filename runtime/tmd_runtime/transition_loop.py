"""The loop of Transition Models (kind "tim"): noise -> latents of a still, one jump per step through a falling list of
times.

The graph `backbone` makes what depends on the prompt alone, once; `flow_head` is a whole step, guidance and update
included. A step with guidance has two rows, with and without the prompt, whose x stay equal; a step without has one.
Not in it yet: deadlines, previews, starting from a picture.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from .loop import check_finite
from .noise import NoiseStream
from .schedule import tim_rope_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest

    from .loop import Timings
    from .settings import Settings


class _Rows:
    """Both graphs bound to buffers of `rows` rows: 1 without guidance, 2 with."""

    def __init__(self, prompt: Engine, transition: Engine, rope: dict[str, NDArray[Any]], dims: dict[str, int]) -> None:
        self.prompt_embeds = prompt.empty("prompt_embeds", **dims)
        context = prompt.empty("context", **dims)
        self.make_context: Callable[[], object] = prompt.bind(
            {"prompt_embeds": self.prompt_embeds}, {"context": context}
        )
        self.x, self.t, self.r, self.guidance = (transition.empty(name, **dims) for name in ("x", "t", "r", "guidance"))
        self.x_next = transition.empty("x_next", **dims)
        given = {"x": self.x, "t": self.t, "r": self.r, "guidance": self.guidance, "context": context, **rope}
        self.step: Callable[[], object] = transition.bind(given, {"x_next": self.x_next})


class TransitionLoop:
    """Both graphs for latents of `latent_shape` and prompts of `text_tokens` tokens."""

    def __init__(
        self,
        backbone: Engine,
        flow_head: Engine,
        manifest: Manifest,
        latent_shape: tuple[int, int, int, int, int],
        text_tokens: int,
    ) -> None:
        _, _, _, height, width = latent_shape
        grid = height // manifest.model.patch_size[1], width // manifest.model.patch_size[2]
        self._shape, self._engines = latent_shape, (backbone, flow_head)
        self._dims = {"height": height, "width": width, "tokens": grid[0] * grid[1], "text": text_tokens}
        self._rope = {name: flow_head.empty(name, **self._dims) for name in ("rope_cos", "rope_sin")}
        tables = tim_rope_tables(*grid, manifest.model.head_dim, manifest.model.rope or "index")
        for buffer, table in zip(self._rope.values(), tables, strict=True):
            buffer[...] = table
        self._bound: dict[int, _Rows] = {}

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, 1, H, W]` float32 in the model's normalised space, for `prompt_embeds` `[1, text, E]`.

        With `negative_embeds`, of the same shape, F = F_neg + settings.guidance·(F_pos - F_neg) in the steps whose t
        lies inside `settings.guidance_interval`. Raises Cancelled if the callback says so, RuntimeFailure if a stage
        gives NaN or Inf.
        """
        low, high = settings.guidance_interval
        g = settings.guidance
        with timings.stage("noise"):
            x = NoiseStream(settings.seed).normal(self._shape).astype(np.float32)
        given = [prompt_embeds] if negative_embeds is None else [prompt_embeds, negative_embeds]
        rows_of = [2 if negative_embeds is not None and low < t < high else 1 for t in settings.times[:-1]]
        for rows in sorted(set(rows_of)):
            if rows not in self._bound:
                self._bound[rows] = _Rows(*self._engines, self._rope, {**self._dims, "batch": rows})
            bound = self._bound[rows]
            start = perf_counter()
            # whole buffers: they may lie on a device
            bound.prompt_embeds[...] = np.concatenate(given[:rows])
            bound.guidance[...] = np.eye(1) if rows == 1 else [[g, 1 - g], [g, 1 - g]]
            bound.make_context()
            timings.add("backbone", perf_counter() - start)
        timings.report("backbone", 1, 1, timings.seconds.get("backbone", 0.0))
        for i, ((t, r), rows) in enumerate(zip(pairwise(settings.times), rows_of, strict=True)):
            start, bound = perf_counter(), self._bound[rows]
            bound.x[...], bound.t[...], bound.r[...] = x, t, r
            bound.step()
            np.copyto(x, bound.x_next[:1])
            check_finite("flow_head", x)
            seconds = perf_counter() - start
            timings.add("flow_head", seconds)
            timings.report("flow_head", i + 1, settings.steps, seconds)
        return x
