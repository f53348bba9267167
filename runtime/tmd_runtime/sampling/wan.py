"""Wan transformers without inner flow: one velocity per step, or two with guidance, and a rule that makes the step.

Both graphs are the transformer, cut in two: the features of the backbone go straight into the rest of it. Of a model
with two transformers (Wan2.2-A14B) the first one makes the steps of high noise and the second one all others, on the
same buffers. A model that holds a picture as its first latent frame (Wan2.2-TI2V-5B) is told which frames are held, and
the update puts the picture back into them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tmd_engines.bundle.families.rules import RULES, Coefficients

from ..errors import UsageFailure
from ..settings import MAX_STEPS, Settings
from .backbone import BoundBackbone
from .calls import Call, Calls, Draws, Launches
from .family import (
    FIRST_FRAME,
    Denoised,
    LatentShape,
    RuntimeFamily,
    check_guidance,
    choose,
    common_settings,
    refuse_jumps,
)  # fmt: skip
from .schedule import GRIDS, told_time, wan_grid
from .update import Updater

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest

    from ..clock import Timings
    from ..settings import Wishes
    from .family import Loop, OpenTransformer


@dataclass(frozen=True)
class WanSettings(Settings):
    """`time_rounding` is how the network reads the times (`told_time`), `init_scale` the deviation of the first noise.
    Steps from below the `boundary`, by what the network reads, are those of the second transformer, with
    `guidance_2`."""

    time_rounding: str = "none"
    init_scale: float = 1.0
    boundary: float = 0.0
    guidance_2: float = 1.0


class _Wan(RuntimeFamily):
    name = "wan"

    def takes_picture(self, manifest: Manifest) -> str | None:
        model: Any = manifest.model
        return FIRST_FRAME if model.first_frame else None

    def settings(self, manifest: Manifest, wishes: Wishes) -> WanSettings:
        """A model has its own list of times, or a grid for any number of steps. Raises UsageFailure."""
        if wishes.strength is not None and self.takes_picture(manifest) is not None:
            raise UsageFailure("this model holds a picture as the first frame, unchanged: leave the strength out.")
        refuse_jumps(wishes)
        sampler: Any = manifest.sampler
        if wishes.inner_steps not in (None, 1):
            raise UsageFailure(f"this model has no inner steps, so it cannot do {wishes.inner_steps}: leave them out.")
        steps = sampler.steps if wishes.steps is None else wishes.steps
        if sampler.allowed_steps is not None:
            steps = choose("steps", wishes.steps, sampler.steps, sampler.allowed_steps)
        if not 1 <= steps <= MAX_STEPS:
            raise UsageFailure(f"{steps} steps cannot be done: choose 1 to {MAX_STEPS} (default {sampler.steps}).")
        guidance, negative_prompt, warnings = model_guidance(sampler, wishes)
        own = sampler.guidance_2
        return WanSettings(
            **common_settings(manifest, wishes, steps, passes=1 if guidance == 1 else 2, warnings=warnings),
            guidance=guidance,
            negative_prompt=negative_prompt,
            times=_times(sampler, steps, wishes.shift),
            time_rounding=sampler.time_rounding,
            init_scale=sampler.init_scale,
            boundary=sampler.boundary or 0.0,
            guidance_2=guidance if own is None or wishes.guidance is not None else own,  # a wish is for both
        )

    def take_turns(self, loop: Loop, transformer: OpenTransformer) -> None:
        assert isinstance(loop, WanLoop)
        loop.transformer = transformer

    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> WanLoop:
        return WanLoop(backbone, flow_head, update, manifest, latent_shape, text_tokens)


WAN = _Wan()


def _times(sampler: Any, steps: int, shift: float | None) -> tuple[float, ...]:
    if shift is not None and sampler.times is not None:
        raise UsageFailure("this model was distilled for fixed times, which have no shift to choose: leave it out.")
    if shift is not None and not 1 <= shift <= 1000:
        raise UsageFailure(f"a shift of {shift:g} is out of range: choose 1 to 1000 (default {sampler.shift:g}).")
    if sampler.times is not None:
        return (*sampler.times[:steps], 0.0)
    return tuple(map(float, GRIDS.get(sampler.grid, wan_grid)(steps, sampler.shift if shift is None else shift)))


def model_guidance(sampler: Any, wishes: Wishes) -> tuple[float, str, tuple[str, ...]]:
    """Guidance, negative prompt and warnings."""
    check_guidance(wishes.guidance, wishes.negative_prompt, sampler.guidance)
    guidance = sampler.guidance if wishes.guidance is None else wishes.guidance
    negative = sampler.negative_prompt if wishes.negative_prompt is None else wishes.negative_prompt
    warnings: tuple[str, ...] = ()
    if sampler.guidance == 1 != guidance:
        warnings = ("the model was distilled to do without guidance; it takes twice the time and may look worse.",)
    return guidance, negative or "", warnings


class _Bound(NamedTuple):
    """The graphs of one transformer on the buffers of a loop."""

    backbone: Callable[[], None]
    flow_head: Callable[[], None]
    launches: Launches


class WanLoop:
    """The sampler of a velocity model, with classifier-free guidance. `told` are the times that its graphs take;
    `transformer` is where the other one of two comes from: see `RuntimeFamily.take_turns`."""

    told: tuple[str, ...] = ("t",)
    transformer: OpenTransformer

    def __init__(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> None:
        self._rule = RULES[manifest.sampler.rule]
        self._holds = "held" in backbone.inputs
        told = (*self.told, *(["held"] if self._holds else []))
        self._bound = bound = BoundBackbone(backbone, manifest, latent_shape, text_tokens, told)
        self._velocity = flow_head.empty("velocity", **bound.dims)
        self._update_engine = update
        self._transformers = {False: self._tied(bound.step, backbone, flow_head)}  # by whether it is the second one
        self._active = self._transformers[False]
        self._updater = Updater(update, bound.x, bound.dims)
        # What the updates of a model that holds frames read beside their slots.
        self._held: dict[str, Any] = {}
        if self._holds:
            self._held = {"held": bound.times["held"], "picture": update.empty("picture", **bound.dims)}
        self._empty = {
            "prompt": lambda: backbone.empty("prompt_embeds", **bound.dims),
            "latents": lambda: update.empty("x_next", **bound.dims),
        }
        self._buffers: dict[str, Any] = {}
        self._updates: dict[frozenset[str], Callable[[], None]] = {}

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
        init: NDArray[Any] | None = None,
    ) -> Denoised:
        """See `Loop.run`. With guidance v = v_neg + guidance·(v_pos - v_neg). `init` becomes the first frame."""
        assert isinstance(settings, WanSettings)
        bound = self._bound
        guided = negative_embeds is not None
        slots = _slots([self._rule(settings.times, i) for i in range(settings.steps)], guided)
        with timings.stage("load"):  # an engine may compile where it is bound
            update = self._update_with(slots)
            self._hold(init)
        passes = settings.steps * (2 if guided else 1)
        calls = Calls(timings, backbone=passes, flow_head=passes)
        draws = Draws(settings.seed, bound.x.shape, timings)

        def velocity(call: Call) -> None:
            call("backbone", self._active.backbone)
            call("flow_head", self._active.flow_head)

        def step(call: Call) -> None:
            if guided:
                bound.prompt_embeds[...] = self._buffer("negative_prompt", "prompt")
                velocity(call)
                self._buffer("negative")[...] = self._velocity
                bound.prompt_embeds[...] = self._buffer("prompt", "prompt")
            velocity(call)
            call("flow_head", update, counts=False)

        bound.prompt_embeds[...] = prompt_embeds
        if guided:
            self._buffer("prompt", "prompt")[...] = prompt_embeds
            self._buffer("negative_prompt", "prompt")[...] = negative_embeds
        guidance = settings.guidance if guided else 1.0

        def try_step() -> None:
            bound.x[...] = 0.0
            self._tell(settings, 1.0, 0.0)
            self._updater.set(self._rule((1.0, 0.0), 0), 1.0, guidance)
            step(lambda stage, run, counts=True: run())

        jumps = self._jumps(settings, calls, timings, try_step)
        draws.into(bound.x, settings.init_scale)
        if init is not None:
            self._put_picture()
        for name in slots & {"before_1", "before_2"}:
            self._buffer(name)[...] = bound.x  # finite, whatever an earlier run left there
        times = [settings.times[0]]
        for t, r in jumps:
            times.append(r)
            factors = self._rule(times, len(times) - 2)
            if factors.noise:
                draws.into(self._buffer("noise"))
            second = told_time(t, settings.time_rounding) < settings.boundary
            self._turn_to(second, timings)
            self._tell(settings, t, r)
            own = settings.guidance_2 if second else settings.guidance
            self._updater.set(factors, t, own if guided else 1.0)
            if guided:
                self._buffer("before_step")[...] = bound.x
            self._active.launches.run(calls, step, key=slots)
            self._updater.check(bound.features, (self._negative_features,) if guided else ())
            if on_preview is not None and r > 0:
                on_preview(self._updater.preview())
        return Denoised(np.array(bound.x, np.float32), tuple(times))

    def _hold(self, picture: NDArray[Any] | None) -> None:
        """Holds `picture` `[1, C, 1, h, w]` as the first latent frame of the run; None: no frame is held."""
        if not self._holds:
            return
        held = np.zeros(self._bound.dims["frames"], np.float32)
        if picture is not None:
            held[0] = 1.0
        self._held["held"][...] = held
        self._held["picture"][...] = 0.0 if picture is None else picture  # finite: it is a term of every update

    def _put_picture(self) -> None:
        """Puts the picture into x, which is noise, by an update that moves nothing."""
        self._updater.set(Coefficients(1.0, 0.0))
        self._update_of_nothing()

    @cached_property
    def _update_of_nothing(self) -> Callable[[], None]:
        """An update that reads no velocity: that buffer could hold anything, and 0 times NaN is NaN."""
        return self._updater.bind(self._bound.x, **self._held)

    def _tell(self, settings: WanSettings, t: float, r: float) -> None:
        """Tells the graphs of the step from t to r."""
        self._bound.t[...] = told_time(t, settings.time_rounding)

    def _jumps(
        self, settings: WanSettings, calls: Calls, timings: Timings, try_step: Callable[[], None]
    ) -> Iterable[tuple[float, float]]:
        """The steps (t, r) of the run. `try_step` takes one that leads nowhere, for its time; x is lost."""
        return pairwise(settings.times)

    def _negative_features(self) -> Any:
        """What the backbone made of the negative prompt in the latest step: only a run that failed asks for it."""
        self._bound.x[...] = self._buffer("before_step")
        self._bound.prompt_embeds[...] = self._buffer("negative_prompt", "prompt")
        self._active.backbone()
        return self._bound.features

    def _tied(self, step: Callable[[], None], backbone: Engine, flow_head: Engine) -> _Bound:
        """A transformer on the buffers of this loop; `step` is its backbone's."""
        bound = self._bound
        # Both passes of guidance go through one binding: a second one would cost an engine's working memory again.
        inputs = {"x": bound.x, **bound.times, **bound.rope, **bound.outputs}
        flow = flow_head.bind(inputs, {"velocity": self._velocity})
        return _Bound(step, flow, Launches(backbone, flow_head, self._update_engine))

    def _turn_to(self, second: bool, timings: Timings) -> None:
        """Makes one of the two transformers the active one; loads it at its first turn."""
        if self._transformers.get(second) is self._active:
            return
        if second not in self._transformers:
            backbone, flow_head = self.transformer(second, timings, self._let_go)
            with timings.stage("load"):  # an engine may compile where it is bound
                self._transformers[second] = self._tied(self._bound.bind(backbone), backbone, flow_head)
        self._active = self._transformers[second]

    def _let_go(self) -> None:
        """Forgets the active transformer, which is about to be closed."""
        self._transformers.clear()
        # What they hold must go; `_active` comes back.
        self._bound.step = self._active = None  # type: ignore[assignment]

    def _buffer(self, name: str, like: str = "latents") -> Any:
        """A buffer that only some runs need, made at its first use, of finite values."""
        if name not in self._buffers:
            self._buffers[name] = self._empty[like]()
            self._buffers[name][...] = 0.0
        return self._buffers[name]

    def _update_with(self, slots: frozenset[str]) -> Callable[[], None]:
        """The update with these slots in use; it keeps the data predictions that later steps read."""
        if slots not in self._updates:
            buffers = {name: self._buffer(name) for name in slots}
            update = self._updater.bind(self._velocity, **buffers, **self._held)

            def update_and_remember() -> None:
                update()
                buffers["before_2"][...] = buffers["before_1"]
                buffers["before_1"][...] = self._updater.data

            self._updates[slots] = update_and_remember if "before_1" in slots else update
        return self._updates[slots]


def _slots(factors: list[Coefficients], guided: bool) -> frozenset[str]:
    """The optional inputs of the graph `update` that a run with these factors reads."""
    slots = {"negative"} if guided else set()
    if any(each.noise for each in factors):
        slots.add("noise")
    if any(each.before_1 or each.before_2 for each in factors):
        slots |= {"before_1", "before_2"}
    return frozenset(slots)
