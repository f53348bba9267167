"""Flow maps (AnyFlow): the graphs are told where a step goes to, and any list of times leads from noise to data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageFailure
from .deadline import StepTimes, steps_ahead, steps_in_time
from .family import LatentShape, RuntimeFamily, common_settings, refuse_pictures
from .jumps import JumpSettings, check_deadline, jump_times
from .schedule import flow_map_grid, uniform_times, warp
from .wan import WanLoop, WanSettings, model_guidance

if TYPE_CHECKING:
    from tmd_engines import Engine, Manifest

    from ..clock import Timings
    from ..settings import Wishes
    from .calls import Calls


@dataclass(frozen=True)
class AnyFlowSettings(JumpSettings, WanSettings):
    """`shift` is the one that the steps of a run with a deadline are warped by."""

    shift: float = 1.0


class _AnyFlow(RuntimeFamily):
    name = "anyflow"

    def settings(self, manifest: Manifest, wishes: Wishes) -> AnyFlowSettings:
        refuse_pictures(wishes)
        check_deadline(wishes)
        sampler: Any = manifest.sampler
        if wishes.inner_steps not in (None, 1):
            raise UsageFailure(f"this model has no inner steps, so it cannot do {wishes.inner_steps}: leave them out.")
        if wishes.shift is not None and wishes.schedule is not None:
            raise UsageFailure("a schedule says what the times are, and a shift has nothing to warp: leave one out.")
        shift = sampler.shift if wishes.shift is None else wishes.shift
        if not 1 <= shift <= 1000:
            raise UsageFailure(f"a shift of {shift:g} is out of range: choose 1 to 1000 (default {sampler.shift:g}).")
        times = jump_times(sampler.steps, wishes, lambda steps: flow_map_grid(steps, shift))
        guidance, negative_prompt, warnings = model_guidance(sampler, wishes)
        passes = 1 if guidance == 1 else 2
        return AnyFlowSettings(
            **common_settings(manifest, wishes, len(times) - 1, passes=passes, warnings=warnings),
            guidance=guidance,
            negative_prompt=negative_prompt,
            times=times,
            deadline=wishes.deadline,
            scheduled=wishes.schedule is not None,
            shift=shift,
        )

    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> AnyFlowLoop:
        return AnyFlowLoop(backbone, flow_head, update, manifest, latent_shape, text_tokens)


ANYFLOW = _AnyFlow()


class AnyFlowLoop(WanLoop):
    """x_r = x_t - (t - r)·u(x_t, t, r), step by step (arXiv 2605.13724; diffusers 0.42, pipeline_anyflow.py)."""

    told = ("t", "r")

    def __init__(self, *bound: Any) -> None:
        """As `WanLoop`."""
        super().__init__(*bound)
        self._costs = StepTimes()

    def _tell(self, settings: WanSettings, t: float, r: float) -> None:
        self._bound.times["t"][...], self._bound.times["r"][...] = t, r

    def _jumps(
        self, settings: WanSettings, calls: Calls, timings: Timings, try_step: Callable[[], None]
    ) -> Iterable[tuple[float, float]]:
        assert isinstance(settings, AnyFlowSettings)
        if settings.deadline is None:
            return pairwise(settings.times)
        start = perf_counter()
        spent = self._costs.measure([settings.passes], settings.deadline, lambda _: try_step(), perf_counter)
        timings.add("load", spent)  # only a first run has it
        return self._in_time(settings, start + settings.deadline + spent, calls)

    def _in_time(self, settings: AnyFlowSettings, end: float, calls: Calls) -> Iterator[tuple[float, float]]:
        """The steps of a run that ends when the clock says `end`, or one step later."""
        passes, planned = settings.passes, not settings.scheduled
        times = tuple(map(float, uniform_times(settings.steps))) if planned else settings.times

        def costs(_: float) -> tuple[float, float]:
            return self._costs[passes], self._costs[passes]

        jumps = steps_in_time(times, settings.scheduled, lambda: end - perf_counter(), costs)
        for done, (t, r) in enumerate(jumps, 1):
            total = done + steps_ahead(t, r, done, settings.steps, planned)
            for stage in ("backbone", "flow_head"):
                calls.expect(stage, total * passes)
            start = perf_counter()
            ends = np.array([t, r])
            at, to = map(float, warp(ends, settings.shift) if planned else ends)
            yield at, to
            self._costs.add(passes, perf_counter() - start)
