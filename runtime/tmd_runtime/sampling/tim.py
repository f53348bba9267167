"""The loop of Transition Models (kind "tim"): noise -> latents of a still, one jump per step through a falling list of
times.

The graph `backbone` makes what depends on the prompt alone, once; `flow_head` is a whole step, guidance and update
included. A step with guidance has two rows, with and without the prompt, whose x stay equal; a step without has one.
A model of classes has the number of the class in the prompt's place. Which steps fit into a deadline, `deadline.py`
says.
"""

from __future__ import annotations

from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..clock import check_finite
from .deadline import StepTimes, steps_in_time
from .noise import NoiseStream
from .schedule import tim_rope_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest

    from ..clock import Timings
    from ..settings import Settings


class _Rows:
    """Both graphs bound to buffers of `rows` rows: 1 without guidance, 2 with."""

    def __init__(self, prompt: Engine, transition: Engine, rope: dict[str, NDArray[Any]], dims: dict[str, int]) -> None:
        (asked,) = prompt.inputs  # prompt_embeds or labels
        self.asked = prompt.empty(asked, **dims)
        context = prompt.empty("context", **dims)
        self.make_context: Callable[[], object] = prompt.bind({asked: self.asked}, {"context": context})
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
        self._costs = StepTimes()
        self.times: tuple[float, ...] = ()

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
        init: NDArray[Any] | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, 1, H, W]` float32 in the model's normalised space, for `prompt_embeds` `[1, text, E]`, or
        int64 `[1]`, the class.

        With `negative_embeds`, of the same shape, F = F_neg + settings.guidance·(F_pos - F_neg) in the steps whose t
        lies inside `settings.guidance_interval`. With `settings.rho`, every step but the first and the last draws fresh
        noise from the seed's stream, behind that of the start. `init` are latents of a picture, from which a run begins
        whose times do so below 1. `on_preview` gets, before every step but the last, the latents of a jump to 0 from
        there. `times` tells afterwards which way the run took. Raises Cancelled if the callback says so, RuntimeFailure
        if a stage gives NaN or Inf.
        """
        given = [prompt_embeds] if negative_embeds is None else [prompt_embeds, negative_embeds]

        def rows_at(t: float) -> int:
            return 2 if negative_embeds is not None and settings.guided(t) else 1

        kinds = sorted({rows_at(t) for t in settings.times[:-1]})
        for rows in kinds:
            self._bind(rows, timings)
        begun, t = perf_counter(), settings.times[0]
        stream = NoiseStream(settings.seed)
        with timings.stage("noise"):
            x = stream.normal(self._shape).astype(np.float32)
            if init is not None:
                x = (t * x + (1 - t) * init).astype(np.float32)
        for rows in kinds:
            self._ask(rows, given, settings.guidance, timings)
        timings.report("backbone", 1, 1, timings.seconds.get("backbone", 0.0))
        ways: Iterator[tuple[float, float]] = pairwise(settings.times)
        if settings.deadline is not None:
            end = begun + settings.deadline + self._measure(kinds, settings.deadline, timings)
            ways = steps_in_time(
                settings.times,
                settings.scheduled,
                lambda: end - perf_counter(),
                lambda t: (self._costs[rows_at(t)], max(self._costs[rows] for rows in kinds)),
            )
        times = [t]
        for t, r in ways:
            if on_preview is not None and r > 0:
                with timings.stage("flow_head"):
                    jump = self._step(x, t, 0.0, rows_at(t)).copy()
                on_preview(jump)
            fresh = settings.rho > 0 and len(times) > 1 and r > 0
            seconds = self._timed_step(x, t, r, rows_at(t), (settings.rho, stream) if fresh else None)
            check_finite("flow_head", x)
            times.append(r)
            timings.add("flow_head", seconds)
            done = len(times) - 1
            planned = settings.deadline is not None and not settings.scheduled
            ahead = round(r / (t - r)) if planned else settings.steps - done
            timings.report("flow_head", done, done + (ahead if r > 0 else 0), seconds)
        self.times = tuple(times)
        return x

    def _bind(self, rows: int, timings: Timings) -> None:
        """The buffers of so many rows; an engine may compile for them here."""
        if rows not in self._bound:
            with timings.stage("load"):
                self._bound[rows] = _Rows(*self._engines, self._rope, {**self._dims, "batch": rows})

    def _ask(self, rows: int, given: list[NDArray[Any]], g: float, timings: Timings) -> None:
        """What `flow_head` needs of the prompt, and how the rows mix."""
        bound = self._bound[rows]
        start = perf_counter()
        # whole buffers: they may lie on a device
        bound.asked[...] = np.concatenate(given[:rows])
        bound.guidance[...] = np.eye(1) if rows == 1 else [[g, 1 - g], [g, 1 - g]]
        bound.make_context()
        timings.add("backbone", perf_counter() - start)

    def _measure(self, kinds: list[int], deadline: float, timings: Timings) -> float:
        """Seconds that went into steps whose time was not known. They count as `load`: only a first run has them."""
        zeros = np.zeros(self._shape, np.float32)

        def cost(rows: int) -> float:
            start = perf_counter()
            self._step(zeros, 1.0, 0.0, rows)
            return perf_counter() - start

        start = perf_counter()
        for rows in kinds:
            if not self._costs.knows(rows):
                first = cost(rows)
                # The very first one may be slow for reasons that do not come back, and here it would decide.
                self._costs.add(rows, cost(rows) if first > deadline / 10 else first)
        seconds = perf_counter() - start
        timings.add("load", seconds)
        return seconds

    def _timed_step(
        self, x: NDArray[np.float32], t: float, r: float, rows: int, fresh: tuple[float, NoiseStream] | None = None
    ) -> float:
        """Moves x from t to r, with `fresh` (rho, noise) in place of some of its noise. Returns the seconds that it
        took, and remembers them."""
        start = perf_counter()
        moved = self._step(x, t, r, rows)
        np.copyto(x, moved if fresh is None else renewed(x, moved, t, r, fresh[0], fresh[1].normal(self._shape)))
        seconds = perf_counter() - start
        self._costs.add(rows, seconds)
        return seconds

    def _step(self, x: NDArray[np.float32], t: float, r: float, rows: int) -> NDArray[np.float32]:
        """x at r, in the engine's own buffer or a copy of it."""
        bound = self._bound[rows]
        bound.x[...], bound.t[...], bound.r[...] = x, t, r
        bound.step()
        moved: NDArray[np.float32] = np.asarray(bound.x_next[:1])
        return moved


def renewed(
    x: NDArray[np.float32], moved: NDArray[np.float32], t: float, r: float, rho: float, noise: NDArray[np.float32]
) -> NDArray[np.float32]:
    """x_r of the stochastic sampler, from `moved` = x - (t - r)·F: less rho·(t - r) of the noise that F sees in x,
    x + (1 - t)·F, and plus √(2·rho·t·(t - r)) of fresh `noise`. (t - r)·F is x - moved, which loses nothing, however
    short the step."""
    seen = (t - r) * x + (1 - t) * (x - moved)
    found: NDArray[np.float32] = moved - rho * seen + (2 * rho * t * (t - r)) ** 0.5 * noise
    return found
