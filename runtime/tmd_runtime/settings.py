"""What one run shall do: the caller's wishes, completed from the manifest and checked before any model is loaded."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import RuntimeFailure, UsageFailure
from .schedule import ROPE_POSITIONS, effective_nfe, shift_grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tmd_engines import Manifest


@dataclass(frozen=True)
class Settings:
    """One run, checked. `width` and `height` in pixels, `fps` in 1/s; `nfe` counts evaluations of the whole model."""

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


def resolve_settings(
    manifest: Manifest,
    seed: int | None = None,
    steps: int | None = None,
    inner_steps: int | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
) -> Settings:
    """Fill what is None from the manifest (the seed at random) and check the rest. `size` is (width, height) in pixels.

    Raises UsageFailure that says what the bundle allows.
    """
    sampler, video = manifest.sampler, manifest.video
    steps = _choose("steps", steps, sampler.steps, sampler.allowed_steps)
    inner_steps = _choose("inner steps", inner_steps, sampler.inner_steps, sampler.allowed_inner_steps)
    for count, shift in ((steps, sampler.shift), (inner_steps, sampler.inner_shift)):
        try:
            shift_grid(count, shift, sampler.t_max)
        except ValueError as error:
            raise RuntimeFailure(f"this bundle allows a step count that its time grid does not: {error}.") from error
    frames = video.frames if frames is None else frames
    width, height = (video.width, video.height) if size is None else size
    warnings = []
    if (frames, width, height) != (video.frames, video.width, video.height):
        warnings.append(
            f"the model was made for {video.frames} frames of {video.width}x{video.height}; "
            f"{frames} of {width}x{height} may look worse."
        )
    model = manifest.model
    return Settings(
        seed=_check_seed(seed),
        steps=steps,
        inner_steps=inner_steps,
        frames=frames,
        width=width,
        height=height,
        fps=video.fps,
        nfe=effective_nfe(steps, inner_steps, model.head_blocks, model.num_layers),
        latent_shape=_latent_shape(manifest, frames, width, height),
        warnings=tuple(warnings),
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
