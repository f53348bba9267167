"""TMD students: an outer step is one pass of the backbone and an inner flow of the flow head on its features.

The host sets scalars, draws noise and keeps the order; all buffers are allocated and bound when the loop is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines.bundle.families.rules import RULES

from ..errors import RuntimeFailure, UsageFailure
from ..settings import Settings
from .backbone import BoundBackbone
from .calls import Call, Calls, Draws, Launches
from .family import Denoised, LatentShape, RuntimeFamily, choose, common_settings, refuse_jumps
from .schedule import shift_grid
from .update import Updater

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest, Step

    from ..clock import Timings
    from ..settings import Wishes


class _Tmd(RuntimeFamily):
    name = "tmd"

    def settings(self, manifest: Manifest, wishes: Wishes) -> Settings:
        """A student does the counts that it was distilled for, without guidance. Raises UsageFailure."""
        refuse_jumps(wishes)
        sampler: Any = manifest.sampler
        for what, value, reason in (
            ("guidance", None if wishes.guidance == 1 else wishes.guidance, "it was trained without"),
            ("negative prompt", wishes.negative_prompt, "it was trained without"),
            ("shift", wishes.shift, "it was trained for its own time grid"),
        ):
            if value is not None:
                raise UsageFailure(f"this model is a TMD student, which takes no {what}: {reason}. Leave it out.")
        steps = choose("steps", wishes.steps, sampler.steps, sampler.allowed_steps)
        inner_steps = choose("inner steps", wishes.inner_steps, sampler.inner_steps, sampler.allowed_inner_steps)
        for count, warp in ((steps, sampler.shift), (inner_steps, sampler.inner_shift)):
            try:
                shift_grid(count, warp, sampler.t_max)
            except ValueError as error:
                raise RuntimeFailure(
                    f"this bundle allows a step count that its time grid does not: {error}."
                ) from error
        return Settings(**common_settings(manifest, wishes, steps, inner_steps))

    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> TmdLoop:
        return TmdLoop(backbone, flow_head, update, manifest, latent_shape, text_tokens)


TMD = _Tmd()


class TmdLoop:
    """TMD's sampler (arXiv 2601.09881, Algorithm 1, with the sign of Eq. 13 corrected)."""

    def __init__(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> None:
        sampler: Any = manifest.sampler
        self._sampler, self._rule = sampler, RULES[sampler.rule]
        self._launches = Launches(backbone, flow_head, update)
        self._bound = BoundBackbone(backbone, manifest, latent_shape, text_tokens)
        s = shift_grid(sampler.inner_steps, sampler.inner_shift, sampler.t_max)
        self._inner = _InnerFlow(flow_head, self._bound, s, own_times=self._launches.records)
        self._updater = Updater(update, self._bound.x, self._bound.dims)
        self._update = self._updater.bind(velocity=self._inner.velocity)

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
        init: NDArray[Any] | None = None,
    ) -> Denoised:
        """See `Loop.run`. A student has no guidance and starts from no picture."""
        outer, inner = settings.steps, settings.inner_steps
        t = shift_grid(outer, self._sampler.shift, self._sampler.t_max)
        s = shift_grid(inner, self._sampler.inner_shift, self._sampler.t_max)
        falling = t[::-1].tolist()  # as a rule counts times
        calls = Calls(timings, backbone=outer, flow_head=outer * inner)
        draws = Draws(settings.seed, self._bound.x.shape, timings)

        def transition(call: Call) -> None:
            call("backbone", self._bound.step)  # x, t, prompt_embeds -> features, context
            for j in range(inner, 0, -1):
                call("flow_head", self._inner.step(s, j))  # y(s_j) -> y(s_{j-1})
            call("flow_head", self._update, counts=False)  # x - (t_i - t_{i-1})·y

        self._bound.prompt_embeds[...] = prompt_embeds
        draws.into(self._bound.x)
        for i in range(outer, 0, -1):
            self._bound.t[...] = t[i]
            draws.into(self._inner.noise)
            self._updater.set(self._rule(falling, outer - i), t[i])
            self._launches.run(calls, transition, key=inner)
            self._updater.check(self._bound.features)
            if on_preview is not None and i > 1:
                on_preview(self._updater.preview())
        return Denoised(np.array(self._bound.x, np.float32))


class _InnerFlow:
    """The flow head, bound for the steps of a rollout that starts from `noise` and ends in `velocity`.

    With `own_times` each step has its s and r in buffers of its own, which a launch of all steps needs; otherwise all
    steps share two.
    """

    def __init__(self, flow_head: Engine, bound: BoundBackbone, s: NDArray[np.float64], own_times: bool) -> None:
        self._flow_head, self._dims, self._own_times = flow_head, bound.dims, own_times
        self.noise = flow_head.empty("noise", **bound.dims)
        # The flow head reads one y and writes the other; its first step reads the noise itself, which saves a copy.
        self._y = [flow_head.empty("y_next", **bound.dims) for _ in range(2)]
        self.velocity = self._y[0]
        self._inputs = {"noise": self.noise, **bound.outputs, **bound.rope}
        self._times: dict[object, tuple[Any, Any]] = {}
        self._steps: dict[object, Step] = {}
        for j in range(1, len(s)):
            self.step(s, j)  # an engine may compile where it is bound

    def step(self, s: NDArray[np.float64], j: int) -> Step:
        """The step of the rollout over the grid `s` from s_j to s_{j-1}."""
        inner = len(s) - 1
        y, y_next = self._y[j % 2] if j < inner else self.noise, self._y[(j - 1) % 2]
        key = (inner, j) if self._own_times else (j < inner, j % 2)
        if key not in self._steps:
            times = self._times_of(key)
            inputs = {"y": y, "s": times[0], "r": times[1], **self._inputs}
            self._steps[key] = self._flow_head.bind(inputs, {"y_next": y_next})
            if self._own_times:
                times[0][...], times[1][...] = s[j], s[j - 1]
        if not self._own_times:
            for buffer, time in zip(self._times_of(key), (s[j], s[j - 1]), strict=True):
                buffer[...] = time
        return self._steps[key]

    def _times_of(self, key: object) -> tuple[Any, Any]:
        """The buffers of s and r."""
        key = key if self._own_times else "shared"
        if key not in self._times:
            s, r = (self._flow_head.empty(name, **self._dims) for name in ("s", "r"))
            self._times[key] = s, r
        return self._times[key]
