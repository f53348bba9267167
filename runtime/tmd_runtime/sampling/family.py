"""What a family gives the runtime, and the checks of settings that families share."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageFailure
from ..settings import MAX_FPS, MAX_SEED, WIDE_SEED
from .schedule import ROPE_POSITIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from tmd_engines import Engine, Manifest

    from ..clock import Timings
    from ..settings import Settings, Wishes

    OpenTransformer = Callable[[bool, Timings, Callable[[], object]], tuple[Engine, Engine]]

LatentShape = tuple[int, int, int, int, int]

START, FIRST_FRAME = "start", "first frame"
"""What a family makes of a picture: what a run with a strength starts from, or the first frame of a video."""

NO_PICTURE = (
    "to start from a picture is for Transition Models, and to hold one as the first frame of a video for "
    "Wan2.2-TI2V-5B. This model does neither: leave it out. (A Wan2.2-TI2V-5B that tmd exported before it could do so "
    "is to be exported again.)"
)


@dataclass(frozen=True)
class Denoised:
    """What a loop made: `latents` float32 `[1, C, T, h, w]`, normalised, and the `times` that it went through, from
    noise to data (empty if the family's settings hold no times)."""

    latents: NDArray[np.float32] = field(repr=False)
    times: tuple[float, ...] = ()


class Loop(Protocol):
    """The graphs of one bundle, bound to buffers for latents of one shape and prompts of one length."""

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
        init: NDArray[Any] | None = None,
    ) -> Denoised:
        """Denoises for `prompt_embeds` `[1, text, E]`, or int64 `[1]`, a class.

        With guidance `negative_embeds` of the same shape are needed. `on_preview` gets, in every step but the last,
        the latents that the run would give if that step were the last. `init` are the latents `[1, C, 1, h, w]` of the
        picture that a run with a strength starts from, or that is the first frame. Raises Cancelled if the callback
        says so, RuntimeFailure if a stage gives NaN or Inf.
        """


class RuntimeFamily(ABC):
    """How models of one family are sampled. `name` is `model.family` of their manifests."""

    name: str

    def takes_picture(self, manifest: Manifest) -> str | None:
        """What a model makes of a picture: `START`, `FIRST_FRAME` or, if it takes none, None."""
        return None

    @abstractmethod
    def settings(self, manifest: Manifest, wishes: Wishes) -> Settings:
        """The wishes, completed from the manifest. Raises UsageFailure that says what the bundle allows."""

    @abstractmethod
    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> Loop:
        """The loop for latents of `latent_shape` and prompts of `text_tokens` tokens; binds the engines."""

    def take_turns(self, loop: Loop, transformer: OpenTransformer) -> None:  # noqa: B027  # most have one alone
        """Tells the loop of a model of two transformers where it gets one of them from: `transformer(second, timings,
        let_go)` loads backbone and flow head, and may call `let_go` and then close those of the other one."""


def common_settings(
    manifest: Manifest,
    wishes: Wishes,
    steps: int,
    inner_steps: int = 1,
    passes: int = 1,
    warnings: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The fields of `Settings` that mean the same in every family, checked. Raises UsageFailure."""
    family, model, video = manifest.family, manifest.model, manifest.video
    _check_label(family.classes(model), wishes.label)
    frames = video.frames if wishes.frames is None else wishes.frames
    width, height = (video.width, video.height) if wishes.size is None else wishes.size
    if (frames, width, height) != (video.frames, video.width, video.height):
        made, wished = ("stills of ", "") if family.makes_stills else (f"{video.frames} frames of ", f"{frames} of ")
        size = f"{made}{video.width}x{video.height}; {wished}{width}x{height}"
        warnings = (*warnings, f"the model was made for {size} may look worse.")
    return {
        "seed": _seed(wishes.seed),
        "steps": steps,
        "inner_steps": inner_steps,
        "frames": frames,
        "width": width,
        "height": height,
        "fps": _fps(wishes.fps, video.fps, family.makes_stills),
        "nfe": family.nfe(model, steps, inner_steps, passes),
        "latent_shape": _latent_shape(manifest, frames, width, height),
        "warnings": warnings,
        "rule": manifest.sampler.rule,
        "label": wishes.label,
    }


def refuse_jumps(wishes: Wishes) -> None:
    """Raises UsageFailure for a wish that takes a model which jumps from any time to any other."""
    for what, value, remedy in (
        ("a schedule of one's own", wishes.schedule, "leave it out"),
        ("a deadline", wishes.deadline, "choose the number of steps"),
    ):
        if value is not None:
            raise UsageFailure(f"{what} is for Transition Models and flow maps, and this is none: {remedy}.")
    refuse_pictures(wishes)


def refuse_pictures(wishes: Wishes) -> None:
    """Raises UsageFailure for a wish that only Transition Models grant."""
    if wishes.strength is not None:
        raise UsageFailure(NO_PICTURE)
    if wishes.rho is not None:
        raise UsageFailure("rho is for Transition Models, and this is none: leave it out.")


def choose(what: str, value: int | None, default: int, allowed: Sequence[int]) -> int:
    """The wished count or the default. Raises UsageFailure for one that is not allowed."""
    if value is None:
        return default
    if value not in allowed:
        raise UsageFailure(f"this model does not do {value} {what}: choose {_listed(allowed)} (default {default}).")
    return value


def check_guidance(guidance: float | None, negative_prompt: str | None, default: float) -> None:
    """Raises UsageFailure for a guidance out of range, and for a negative prompt without guidance."""
    if guidance is not None and not 0 <= guidance <= 1000:
        raise UsageFailure(f"a guidance of {guidance:g} is out of range: choose 0 to 1000, where 1 switches it off.")
    if negative_prompt is not None and (default if guidance is None else guidance) == 1:
        raise UsageFailure("a negative prompt needs guidance, and this run has none: choose a guidance other than 1.")


def _check_label(classes: int | None, label: int | None) -> None:
    if classes is None and label is not None:
        raise UsageFailure("this model takes a prompt and has no numbered classes: leave the class out.")
    if classes is not None and label is None:
        raise UsageFailure(
            f"this model draws numbered classes and takes no prompt: choose a class, 0 to {classes - 1}."
        )
    if classes is not None and label is not None and not 0 <= label < classes:
        raise UsageFailure(f"there is no class {label}: choose one from 0 to {classes - 1}.")


def _fps(fps: int | None, default: int, makes_stills: bool) -> int:
    if fps is None:
        return default
    if makes_stills:
        raise UsageFailure("this model makes stills, which have no frames per second: leave them out.")
    if not 1 <= fps <= MAX_FPS:
        raise UsageFailure(f"{fps} frames per second are out of range: choose 1 to {MAX_FPS} (default {default}).")
    return int(fps)


def _listed(values: Sequence[int]) -> str:
    *first, last = [str(value) for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _seed(seed: int | None) -> int:
    if seed is None:
        # 32 bits: torch's CPU generator, whose stream we follow, uses no more of a seed.
        return secrets.randbits(32)
    if not 0 <= seed <= MAX_SEED:
        raise UsageFailure(f"the seed {seed} is out of range: {WIDE_SEED}")
    return int(seed)


def _latent_shape(manifest: Manifest, frames: int, width: int, height: int) -> LatentShape:
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
    latent_frames = (frames - 1) // step + 1
    return (1, latents.channels, latent_frames, height // latents.spatial_stride, width // latents.spatial_stride)


def _check_positions(what: str, value: int, limit: int) -> None:
    if value > limit:
        raise UsageFailure(f"{value} {what} are more than the model has positions for: choose at most {limit}.")
