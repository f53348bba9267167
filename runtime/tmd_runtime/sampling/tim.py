"""Transition Models: noise -> latents of a still, one jump per step through a falling list of times.

`backbone` makes what depends on the prompt alone, once; `flow_head` is a whole step, guidance and update included. A
step with guidance has two rows, with and without the prompt, whose x stay equal; a step without has one. A model of
classes has the number of the class in the prompt's place. `deadline.py` says which steps fit into a deadline.
"""

from __future__ import annotations

import math
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines.bundle.families.rules import Coefficients

from ..clock import Timings
from .calls import Call, Calls, Draws, Launches
from .deadline import StepTimes, steps_ahead, steps_in_time
from .family import START, Denoised, LatentShape, RuntimeFamily
from .schedule import tim_rope_tables
from .tim_settings import TimSettings, tim_settings
from .update import Updater

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest

    from ..settings import Settings, Wishes

MOVE = Coefficients(0.0, 1.0)
"""x becomes what `flow_head` made of it."""


def mixture(t: float) -> Coefficients:
    """x_t = t·noise + (1 - t)·data, of the noise in x and a picture in the place of the velocity."""
    return Coefficients(t, 1.0 - t)


def renewal(t: float, r: float, rho: float) -> Coefficients:
    """x_r of the stochastic sampler, of x_t and `moved` = x_t - (t - r)·F in the place of the velocity.

    It is `moved` less rho·(t - r) of the noise that F sees in x_t, x_t + (1 - t)·F, plus √(2·rho·t·(t - r)) of fresh
    noise. With (t - r)·F = x_t - moved, which loses nothing however short the step is, the noise to take away is
    rho·((1 - r)·x_t - (1 - t)·moved).
    """
    return Coefficients(-rho * (1.0 - r), 1.0 + rho * (1.0 - t), math.sqrt(2.0 * rho * t * (t - r)))


class _Tim(RuntimeFamily):
    name = "tim"

    def takes_picture(self, manifest: Manifest) -> str:
        return START

    def settings(self, manifest: Manifest, wishes: Wishes) -> TimSettings:
        return tim_settings(manifest, wishes)

    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> TimLoop:
        return TimLoop(backbone, flow_head, update, manifest, latent_shape, text_tokens)


TIM = _Tim()


class TimLoop:
    """TiM's sampler (arXiv 2509.04394), deterministic or, with rho, stochastic."""

    def __init__(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> None:
        _, _, _, height, width = latent_shape
        model: Any = manifest.model
        grid = height // model.patch_size[1], width // model.patch_size[2]
        self._shape, self._engines = latent_shape, (backbone, flow_head, update)
        self._dims = {"height": height, "width": width, "tokens": grid[0] * grid[1], "text": text_tokens}
        self._rope = {name: flow_head.empty(name, **self._dims) for name in ("rope_cos", "rope_sin")}
        for buffer, table in zip(self._rope.values(), tim_rope_tables(*grid, model.head_dim, model.rope), strict=True):
            buffer[...] = table
        self._rows: dict[int, _Rows] = {}
        self._costs = StepTimes()

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
        init: NDArray[Any] | None = None,
    ) -> Denoised:
        """See `Loop.run`. Guidance, F = F_neg + g·(F_pos - F_neg), is in the steps whose t lies inside its interval.

        With rho, every step but the first and the last draws fresh noise, behind that of the start.
        """
        assert isinstance(settings, TimSettings)
        prompts = [prompt_embeds] if negative_embeds is None else [prompt_embeds, negative_embeds]

        def rows_at(t: float) -> int:
            return 2 if negative_embeds is not None and settings.guided(t) else 1

        kinds = sorted({rows_at(t) for t in settings.times[:-1]})
        for rows in kinds:
            self._bind(rows, timings)
        start = perf_counter()
        for rows in kinds:
            with timings.stage("backbone"):
                self._rows[rows].read(prompts[:rows], settings.guidance)
        timings.report("backbone", 1, 1, timings.seconds["backbone"])
        jumps: Iterator[tuple[float, float]] = pairwise(settings.times)
        if settings.deadline is not None:
            spent = self._costs.measure(
                kinds, settings.deadline, lambda rows: self._rows[rows].try_step(), perf_counter
            )
            timings.add("load", spent)  # only a first run has it
            end = start + settings.deadline + spent
            jumps = steps_in_time(
                settings.times,
                settings.scheduled,
                lambda: end - perf_counter(),
                lambda t: (self._costs[rows_at(t)], max(self._costs[rows] for rows in kinds)),
            )
        calls = Calls(timings, flow_head=settings.steps)
        draws = Draws(settings.seed, self._shape, timings)
        times = [settings.times[0]]
        now = self._rows[rows_at(times[0])]
        draws.into(now.x)
        if init is not None:
            now.mix(init, times[0])
        for t, r in jumps:
            now = self._rows[rows_at(t)].continue_from(now)
            if on_preview is not None and r > 0:
                with timings.stage("flow_head"):
                    data = now.look(t, 0.0)
                on_preview(data)
            start = perf_counter()
            factors = MOVE
            if settings.rho > 0 and len(times) > 1 and r > 0:
                draws.into(now.noise)
                factors = renewal(t, r, settings.rho)
            planned = settings.deadline is not None and not settings.scheduled
            calls.expect("flow_head", len(times) + steps_ahead(t, r, len(times), settings.steps, planned))
            now.step(calls, t, r, factors)
            self._costs.add(rows_at(t), perf_counter() - start)
            times.append(r)
        return Denoised(np.array(np.asarray(now.x)[:1], np.float32), tuple(times))

    def _bind(self, rows: int, timings: Timings) -> None:
        """The buffers of so many rows; an engine may compile for them here."""
        if rows not in self._rows:
            with timings.stage("load"):
                self._rows[rows] = _Rows(*self._engines, self._rope, {**self._dims, "batch": rows})


class _Rows:
    """The graphs bound to buffers of `batch` rows: 1 without guidance, 2 with. The rows of x are equal."""

    def __init__(
        self, backbone: Engine, flow_head: Engine, update: Engine, rope: dict[str, Any], dims: dict[str, int]
    ) -> None:
        (prompt,) = backbone.inputs  # prompt_embeds or labels
        self._prompt = backbone.empty(prompt, **dims)
        self._context = backbone.empty("context", **dims)
        self._backbone = backbone.bind({prompt: self._prompt}, {"context": self._context})
        self.x, self._t, self._r, self._guidance = (
            flow_head.empty(name, **dims) for name in ("x", "t", "r", "guidance")
        )
        self._moved = flow_head.empty("x_next", **dims)
        inputs = {"x": self.x, "t": self._t, "r": self._r, "guidance": self._guidance, "context": self._context}
        self._flow_head = flow_head.bind({**inputs, **rope}, {"x_next": self._moved})
        self.noise = update.empty("noise", **dims)
        self.noise[...] = 0.0  # finite in runs that draw none
        self._updater = Updater(update, self.x, dims)
        self._update = self._updater.bind(velocity=self._moved, noise=self.noise)
        self._launches = Launches(flow_head, update)

    def read(self, prompts: list[NDArray[Any]], g: float) -> None:
        """What the steps need of one prompt per row, and how the rows mix."""
        self._prompt[...] = np.concatenate(prompts)
        self._guidance[...] = np.eye(1) if len(prompts) == 1 else [[g, 1 - g], [g, 1 - g]]
        self._backbone()

    def mix(self, picture: NDArray[Any], t: float) -> None:
        """x, which is noise, becomes a picture at time t."""
        self._moved[...] = picture
        self._updater.set(mixture(t))
        self._update()

    def continue_from(self, other: _Rows) -> _Rows:
        """These rows, each with the x of `other`."""
        if other is not self:
            self.x[...] = np.asarray(other.x)[:1]
        return self

    def step(self, calls: Calls, t: float, r: float, factors: Coefficients) -> None:
        """Moves x from t to r. Raises RuntimeFailure for NaN or Inf."""
        self._move(calls, t, r, factors)
        self._updater.check(self._context)

    def try_step(self) -> None:
        """A step that leads nowhere, for the time that it takes. x is lost."""
        self.x[...] = 0.0
        self._move(Calls(Timings(), flow_head=1), 1.0, 0.0, MOVE)

    def look(self, t: float, r: float) -> NDArray[np.float32]:
        """Where a jump from t to r would lead; x stays."""
        self._t[...], self._r[...] = t, r
        self._flow_head()
        return np.array(np.asarray(self._moved)[:1], np.float32)

    def _move(self, calls: Calls, t: float, r: float, factors: Coefficients) -> None:
        self._t[...], self._r[...] = t, r
        self._updater.set(factors)
        self._launches.run(calls, self._calls)

    def _calls(self, call: Call) -> None:
        call("flow_head", self._flow_head)
        call("flow_head", self._update, counts=False)
