"""What one run shall do: the caller's wishes, completed from the manifest and checked before any model is loaded."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from .errors import RuntimeFailure, UsageFailure
from .schedule import ROPE_POSITIONS, effective_nfe, shift_grid, uniform_times, wan_grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmd_engines import Manifest
    from tmd_engines.manifest import FlowMapSampler, TransitionSampler, VelocitySampler

MAX_STEPS = 1000


@dataclass(frozen=True)
class Settings:
    """One run, checked. `width` and `height` in pixels, `fps` in 1/s; `nfe` counts evaluations of the whole model.

    For models without inner flow `inner_steps` is 1, and `times` (descending, ending in 0), `time_rounding` and
    `init_scale` say how to sample; a `guidance` other than 1 takes a second pass with `negative_prompt`, of a
    Transition Model only in the steps from a time inside `guidance_interval`, without its ends.
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

    @property
    def passes(self) -> int:
        """Runs of the model per step."""
        return 1 if self.guidance == 1 else 2


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
) -> Settings:
    """Fill what is None from the manifest (the seed at random) and check the rest. `size` is (width, height) in pixels.

    `schedule` are the times of a Transition Model, falling from 1 to 0, in the place of `steps`.
    Raises UsageFailure that says what the bundle allows.
    """
    sampler, video = manifest.sampler, manifest.video
    if schedule is not None and sampler.rule != "flow_map":
        raise UsageFailure("a schedule of one's own is for Transition Models, and this is none: leave it out.")
    if sampler.rule == "flow_map":
        if manifest.model.classes is not None:
            raise RuntimeFailure("this model draws numbered classes and takes no prompt, which is not supported yet.")
        if frames not in (None, 1):
            raise UsageFailure(f"this model makes stills, so it cannot do {frames} frames: leave them out.")
        sampling = _flow_map(sampler, steps, inner_steps, guidance, negative_prompt, shift, schedule)
    elif sampler.rule == "transition":
        sampling = _student(sampler, steps, inner_steps, guidance, negative_prompt, shift)
    else:
        sampling = _without_inner_flow(sampler, steps, inner_steps, guidance, negative_prompt, shift)
    frames = video.frames if frames is None else frames
    width, height = (video.width, video.height) if size is None else size
    warnings = list(sampling.warnings)
    if (frames, width, height) != (video.frames, video.width, video.height):
        warnings.append(
            f"the model was made for {video.frames} frames of {video.width}x{video.height}; "
            f"{frames} of {width}x{height} may look worse."
        )
    model = manifest.model
    nfe = effective_nfe(sampling.steps, sampling.inner_steps, model.head_blocks, model.num_layers)
    nfe *= 1 if sampling.guidance == 1 else 2
    if sampler.rule == "flow_map":
        nfe = float(sum(1 + (sampling.guidance != 1 and _inside(t, sampling)) for t in sampling.times[:-1]))
    return Settings(
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
    )


def _inside(t: float, sampling: _Sampling) -> bool:
    low, high = sampling.guidance_interval
    return low < t < high


def _flow_map(
    sampler: FlowMapSampler,
    steps: int | None,
    inner_steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    shift: float | None,
    schedule: Sequence[float] | None,
) -> _Sampling:
    for what, value in (("inner steps", None if inner_steps == 1 else inner_steps), ("shift", shift)):
        if value is not None:
            raise UsageFailure(f"this model is a Transition Model, which has no {what}: leave it out.")
    if schedule is not None and steps is not None:
        raise UsageFailure("a schedule says how many steps there are: leave the steps out.")
    count = (sampler.steps if steps is None else steps) if schedule is None else len(schedule) - 1
    if not 1 <= count <= MAX_STEPS:
        raise UsageFailure(f"{count} steps cannot be done: choose 1 to {MAX_STEPS} (default {sampler.steps}).")
    times = tuple(map(float, uniform_times(count) if schedule is None else schedule))
    if times[0] != 1 or times[-1] != 0 or any(later >= earlier for earlier, later in pairwise(times)):
        raise UsageFailure("the times of a schedule must fall from 1 (noise) to 0 (the picture), such as 1,0.6,0.2,0.")
    _check_guidance(guidance, negative_prompt, sampler.guidance)
    chosen = _Sampling(
        count,
        1,
        times,
        sampler.guidance if guidance is None else guidance,
        (sampler.negative_prompt if negative_prompt is None else negative_prompt) or "",
        guidance_interval=sampler.guidance_interval,
    )
    if any(_inside(t, chosen) for t in times[:-1]):
        return chosen
    low, high = sampler.guidance_interval
    asked = guidance not in (None, 1) or negative_prompt is not None
    said = f"no step begins at a time between {low:g} and {high:g}, where guidance takes part: there is none."
    return replace(chosen, guidance=1.0, negative_prompt="", warnings=(said,) if asked else ())


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
