"""What one run shall do: the caller's wishes, completed from the manifest and checked before any model is loaded."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

from .errors import RuntimeFailure, UsageFailure
from .sampling.schedule import ROPE_POSITIONS, effective_nfe, shift_grid, uniform_times, wan_grid

if TYPE_CHECKING:
    from tmd_engines import Manifest
    from tmd_engines.bundle.manifest import FlowMapSampler, TransitionSampler, VelocitySampler

MAX_STEPS = 1000
MAX_DEADLINE = 86400  # a day, in seconds
MAX_RHO = 10.0  # the manifest's limit


@dataclass(frozen=True)
class Settings:
    """One run, checked. `width` and `height` in pixels, `fps` in 1/s; `nfe` counts evaluations of the whole model.

    For models without inner flow `inner_steps` is 1, and `times` (descending, ending in 0), `time_rounding` and
    `init_scale` say how to sample; a `guidance` other than 1 takes a second pass with `negative_prompt`, of a
    Transition Model only in the steps from a time inside `guidance_interval`, without its ends. With a `deadline`, in
    seconds, `times` are the finest that a run may take, or with `scheduled` those it shall take as long as it can.
    `strength` is the first of them where a run starts from a picture; `label` is the class to draw; `rho` is how much
    of x's noise a step between the first and the last replaces by fresh noise.
    """

    seed: int
    steps: int
    inner_steps: int
    frames: int
    width: int
    height: int
    fps: int
    nfe: float
    latent_shape: tuple[int, int, int, int, int]
    warnings: tuple[str, ...] = ()
    rule: str = "transition"
    guidance: float = 1.0
    negative_prompt: str = ""
    times: tuple[float, ...] = ()
    time_rounding: str = "none"
    init_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    deadline: float | None = None
    scheduled: bool = False
    strength: float | None = None
    label: int | None = None
    rho: float = 0.0

    def guided(self, t: float) -> bool:
        """Whether the step of a Transition Model from time t takes guidance."""
        low, high = self.guidance_interval
        return self.guidance != 1 and low < t < high

    def through(self, times: Sequence[float]) -> Settings:
        """The same run of a Transition Model through other times: what it came to, when a deadline decided."""
        nfe = float(sum(1 + self.guided(t) for t in times[:-1]))
        return replace(self, times=tuple(times), steps=len(times) - 1, nfe=nfe)

    @property
    def passes(self) -> int:
        """Runs of the model per step."""
        return 1 if self.guidance == 1 else 2

    @property
    def details(self) -> dict[str, str]:
        """What only Transition Models can be told, in words for files: class, rho, strength and schedule."""
        said: dict[str, str] = {}
        if self.label is not None:
            said["class"] = str(self.label)
        if self.rho:
            said["rho"] = f"{self.rho:g}"
        if self.strength is not None:
            said["strength"] = f"{self.strength:g}"
        if self.scheduled or self.deadline is not None:
            said["schedule"] = ",".join(map(repr, self.times))
        return said


@dataclass(frozen=True)
class _Sampling:
    """The part of the settings that depends on the kind of model."""

    steps: int
    inner_steps: int
    times: tuple[float, ...] = ()
    guidance: float = 1.0
    negative_prompt: str = ""
    time_rounding: str = "none"
    init_scale: float = 1.0
    warnings: tuple[str, ...] = ()
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    rho: float = 0.0


class Wishes(TypedDict, total=False):
    """What only some models can do, by name; `resolve_settings` says what each is."""

    guidance: float | None
    negative_prompt: str | None
    shift: float | None
    schedule: Sequence[float] | None
    deadline: float | None
    strength: float | None
    label: int | None
    rho: float | None


def resolve_settings(
    manifest: Manifest,
    seed: int | None = None,
    steps: int | None = None,
    inner_steps: int | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    shift: float | None = None,
    schedule: Sequence[float] | None = None,
    deadline: float | None = None,
    strength: float | None = None,
    label: int | None = None,
    rho: float | None = None,
) -> Settings:
    """Fill what is None from the manifest (the seed at random) and check the rest. `size` is (width, height) in pixels.

    For Transition Models: `schedule` are times falling from 1 to 0, in the place of `steps`; `deadline`, the seconds
    that the steps may take, makes `steps` the most of them; `strength` is the time in (0, 1] at which a run from
    a picture begins, in the place of 1; `label` is the class, for a model of classes; `rho` puts fresh noise into the
    steps between the first and the last.
    Raises UsageFailure that says what the bundle allows.
    """
    sampler, video = manifest.sampler, manifest.video
    if sampler.rule != "flow_map":
        _refuse_jumps(schedule, deadline, strength, rho)
    _check_label(manifest, label)
    if sampler.rule == "flow_map":
        if frames not in (None, 1):
            raise UsageFailure(f"this model makes stills, so it cannot do {frames} frames: leave them out.")
        if label is not None and negative_prompt is not None:
            raise UsageFailure("this model draws numbered classes, which have no negative prompt: leave it out.")
        if deadline is not None and not 0 < deadline <= MAX_DEADLINE:
            raise UsageFailure(f"a deadline of {deadline:g} s is out of range: choose above 0, up to {MAX_DEADLINE}.")
        if deadline is not None and steps is None:
            steps = MAX_STEPS if schedule is None else None
        sampling = _flow_map(sampler, steps, inner_steps, guidance, negative_prompt, shift, schedule, strength, rho)
    elif sampler.rule == "transition":
        sampling = _student(sampler, steps, inner_steps, guidance, negative_prompt, shift)
    else:
        sampling = _without_inner_flow(sampler, steps, inner_steps, guidance, negative_prompt, shift)
    frames = video.frames if frames is None else frames
    width, height = (video.width, video.height) if size is None else size
    warnings = list(sampling.warnings)
    if (frames, width, height) != (video.frames, video.width, video.height):
        made, asked = (
            (f"{video.frames} frames of ", f"{frames} of ") if manifest.model.kind != "tim" else ("stills of ", "")
        )
        warnings.append(
            f"the model was made for {made}{video.width}x{video.height}; {asked}{width}x{height} may look worse."
        )
    model = manifest.model
    nfe = effective_nfe(sampling.steps, sampling.inner_steps, model.head_blocks, model.num_layers)
    nfe *= 1 if sampling.guidance == 1 else 2
    settings = Settings(
        seed=_check_seed(seed),
        steps=sampling.steps,
        inner_steps=sampling.inner_steps,
        frames=frames,
        width=width,
        height=height,
        fps=video.fps,
        nfe=nfe,
        latent_shape=_latent_shape(manifest, frames, width, height),
        warnings=tuple(warnings),
        rule=sampler.rule,
        guidance=sampling.guidance,
        negative_prompt=sampling.negative_prompt,
        times=sampling.times,
        time_rounding=sampling.time_rounding,
        init_scale=sampling.init_scale,
        guidance_interval=sampling.guidance_interval,
        deadline=deadline,
        scheduled=schedule is not None,
        strength=strength,
        label=label,
        rho=sampling.rho,
    )
    return settings.through(settings.times) if sampler.rule == "flow_map" else settings


def _refuse_jumps(
    schedule: Sequence[float] | None, deadline: float | None, strength: float | None, rho: float | None
) -> None:
    """What takes a jump from any time to any other, or was made for such a model."""
    for what, value, instead in (
        ("a schedule of one's own", schedule, "leave it out"),
        ("a deadline", deadline, "choose the number of steps"),
        ("to start from a picture", strength, "leave it out"),
        ("rho", rho, "leave it out"),
    ):
        if value is not None:
            raise UsageFailure(f"{what} is for Transition Models, and this is none: {instead}.")


def _check_label(manifest: Manifest, label: int | None) -> None:
    classes = manifest.model.classes
    if classes is None and label is not None:
        raise UsageFailure("this model takes a prompt and has no numbered classes: leave the class out.")
    if classes is not None and label is None:
        raise UsageFailure(
            f"this model draws numbered classes and takes no prompt: choose a class, 0 to {classes - 1}."
        )
    if classes is not None and label is not None and not 0 <= label < classes:
        raise UsageFailure(f"there is no class {label}: choose one from 0 to {classes - 1}.")


def _flow_map(
    sampler: FlowMapSampler,
    steps: int | None,
    inner_steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    shift: float | None,
    schedule: Sequence[float] | None,
    strength: float | None,
    rho: float | None,
) -> _Sampling:
    for what, value in (("inner steps", None if inner_steps == 1 else inner_steps), ("shift", shift)):
        if value is not None:
            raise UsageFailure(f"this model is a Transition Model, which has no {what}: leave it out.")
    if schedule is not None and steps is not None:
        raise UsageFailure("a schedule says how many steps there are: leave the steps out.")
    count = (sampler.steps if steps is None else steps) if schedule is None else len(schedule) - 1
    if not 1 <= count <= MAX_STEPS:
        raise UsageFailure(f"{count} steps cannot be done: choose 1 to {MAX_STEPS} (default {sampler.steps}).")
    start = 1.0 if strength is None else float(strength)
    if not 0 < start <= 1:
        raise UsageFailure(f"a strength of {start:g} is out of range: choose above 0 (keeps the picture) and up to 1.")
    times = tuple(map(float, start * uniform_times(count) if schedule is None else schedule))
    if times[0] != start or times[-1] != 0 or any(later >= earlier for earlier, later in pairwise(times)):
        where = "1 (noise)" if strength is None else f"{start:g} (the strength)"
        example = ",".join(f"{start * share:g}" for share in (1, 0.6, 0.2, 0))
        raise UsageFailure(f"the times of a schedule must fall from {where} to 0 (the picture), such as {example}.")
    if rho is not None and not 0 <= rho <= MAX_RHO:
        raise UsageFailure(f"a rho of {rho:g} is out of range: choose 0 (no fresh noise) to {MAX_RHO:g}.")
    _check_guidance(guidance, negative_prompt, sampler.guidance)
    warnings: tuple[str, ...] = ()
    if count < 3 and rho:
        warnings = (f"{count} steps have none between the first and the last, where rho adds noise: there is none.",)
    chosen = _Sampling(
        count,
        1,
        times,
        sampler.guidance if guidance is None else guidance,
        (sampler.negative_prompt if negative_prompt is None else negative_prompt) or "",
        warnings=warnings,
        guidance_interval=sampler.guidance_interval,
        rho=0.0 if count < 3 else sampler.rho if rho is None else rho,
    )
    low, high = sampler.guidance_interval
    if any(low < t < high for t in times[:-1]):
        return chosen
    asked = guidance not in (None, 1) or negative_prompt is not None
    said = f"no step begins at a time between {low:g} and {high:g}, where guidance takes part: there is none."
    return replace(chosen, guidance=1.0, negative_prompt="", warnings=(*warnings, *([said] if asked else [])))


def _check_guidance(guidance: float | None, negative_prompt: str | None, default: float) -> None:
    if guidance is not None and not 0 <= guidance <= 1000:
        raise UsageFailure(f"a guidance of {guidance:g} is out of range: choose 0 to 1000, where 1 switches it off.")
    if negative_prompt is not None and (default if guidance is None else guidance) == 1:
        raise UsageFailure("a negative prompt needs guidance, and this run has none: choose a guidance other than 1.")


def _student(
    sampler: TransitionSampler,
    steps: int | None,
    inner_steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    shift: float | None,
) -> _Sampling:
    for what, value in (("guidance", guidance), ("negative prompt", negative_prompt), ("shift", shift)):
        if value is not None and (what, value) != ("guidance", 1):
            raise UsageFailure(
                f"this model is a TMD student, which takes no {what}: it was trained without. Leave it out."
            )
    steps = _choose("steps", steps, sampler.steps, sampler.allowed_steps)
    inner_steps = _choose("inner steps", inner_steps, sampler.inner_steps, sampler.allowed_inner_steps)
    for count, warp in ((steps, sampler.shift), (inner_steps, sampler.inner_shift)):
        try:
            shift_grid(count, warp, sampler.t_max)
        except ValueError as error:
            raise RuntimeFailure(f"this bundle allows a step count that its time grid does not: {error}.") from error
    return _Sampling(steps, inner_steps)


def _without_inner_flow(
    sampler: VelocitySampler,
    steps: int | None,
    inner_steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    shift: float | None,
) -> _Sampling:
    if inner_steps not in (None, 1):
        raise UsageFailure(f"this model has no inner steps, so it cannot do {inner_steps}: leave them out.")
    if sampler.allowed_steps is not None:
        steps = _choose("steps", steps, sampler.steps, sampler.allowed_steps)
    steps = sampler.steps if steps is None else steps
    if not 1 <= steps <= MAX_STEPS:
        raise UsageFailure(f"{steps} steps cannot be done: choose 1 to {MAX_STEPS} (default {sampler.steps}).")
    if shift is not None and sampler.times is not None:
        raise UsageFailure("this model was distilled for fixed times, which have no shift to choose: leave it out.")
    if shift is not None and not 1 <= shift <= 1000:
        raise UsageFailure(f"a shift of {shift:g} is out of range: choose 1 to 1000 (default {sampler.shift:g}).")
    _check_guidance(guidance, negative_prompt, sampler.guidance)
    chosen = sampler.guidance if guidance is None else guidance
    if sampler.times is None:
        times = tuple(map(float, wan_grid(steps, sampler.shift if shift is None else shift)))
    else:
        times = (*sampler.times[:steps], 0.0)
    warnings: tuple[str, ...] = ()
    if sampler.guidance == 1 != chosen:
        warnings = ("the model was distilled to do without guidance; it takes twice the time and may look worse.",)
    return _Sampling(
        steps,
        1,
        times,
        chosen,
        (sampler.negative_prompt if negative_prompt is None else negative_prompt) or "",
        sampler.time_rounding,
        sampler.init_scale,
        warnings,
    )


def _choose(what: str, value: int | None, default: int, allowed: Sequence[int]) -> int:
    if value is None:
        return default
    if value not in allowed:
        raise UsageFailure(f"this model does not do {value} {what}: choose {_list(allowed)} (default {default}).")
    return value


def _list(values: Sequence[int]) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _check_seed(seed: int | None) -> int:
    if seed is None:
        # 32 bits: torch's CPU generator, whose stream we follow, uses no more of a seed.
        return secrets.randbits(32)
    if not 0 <= seed < 1 << 64:
        raise UsageFailure(
            f"the seed {seed} is out of range: choose a whole number from 0 to 18446744073709551615 (2^64-1)."
        )
    return seed


def _latent_shape(manifest: Manifest, frames: int, width: int, height: int) -> tuple[int, int, int, int, int]:
    latents, patch = manifest.latents, manifest.model.patch_size
    step = latents.temporal_stride
    if frames < 1 or (frames - 1) % step:
        below = max((frames - 1) // step, 0) * step + 1
        raise UsageFailure(
            f"{frames} frames cannot be made: choose 1 plus a multiple of {step}, such as {below} or {below + step}."
        )
    _check_positions("frames", frames, (ROPE_POSITIONS - 1) * step + 1)
    for side, pixels, p in (("width", width, patch[2]), ("height", height, patch[1])):
        unit = latents.spatial_stride * p
        if pixels < unit or pixels % unit:
            below = max(pixels // unit, 1) * unit
            raise UsageFailure(
                f"a {side} of {pixels} pixels cannot be made: "
                f"choose a multiple of {unit}, such as {below} or {below + unit}."
            )
        _check_positions(f"pixels of {side}", pixels, ROPE_POSITIONS * unit)
    latent_frames = (frames - 1) // latents.temporal_stride + 1
    return (1, latents.channels, latent_frames, height // latents.spatial_stride, width // latents.spatial_stride)


def _check_positions(what: str, value: int, limit: int) -> None:
    if value > limit:
        raise UsageFailure(f"{value} {what} are more than the model has positions for: choose at most {limit}.")
