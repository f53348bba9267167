"""What a caller asks of a run, and what the run shall do: the wishes, completed from the manifest and checked.

The completing is a family's own (`sampling`). A run resolves its settings once, before any model is loaded, and passes
them on; nothing changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypedDict

from tmd_engines.utf8 import NOT_UTF_8, is_utf8

from .errors import UsageFailure

MAX_STEPS = 1000
MAX_SEED = 2**32 - 1
MAX_FPS = 1000
WIDE_SEED = (
    f"give a whole number from 0 to {MAX_SEED} (2^32-1). The noise is that of torch's CPU generator, which reads 32 "
    "bits of a seed, so a larger one would give the video of another."
)


class MoreWishes(TypedDict, total=False):
    """The wishes of which most are granted by some families only, for keyword arguments; see `Wishes`."""

    guidance: float | None
    negative_prompt: str | None
    shift: float | None
    schedule: Sequence[float] | None
    deadline: float | None
    strength: float | None
    label: int | None
    rho: float | None
    fps: int | None


@dataclass(frozen=True)
class Wishes:
    """What a caller asks for. None leaves it to the bundle, and the seed to chance.

    `size` is (width, height) in pixels. `fps` is how fast the frames are shown, and changes none of them. `guidance` 1
    switches guidance off; `negative_prompt` is what it steers away from. `shift` warps the time grid of a model without
    fixed times. For Transition Models and flow maps: `schedule` is a list of times that falls from 1 to 0, in the place
    of `steps`; `deadline` is how many seconds the steps may take, and makes `steps` the most of them. For Transition
    Models: `strength` is the time in (0, 1] at which a run from a picture starts, in the place of 1; `label` is the
    class to draw, for a model of numbered classes; `rho` puts fresh noise into the steps between the first and last.
    """

    seed: int | None = None
    steps: int | None = None
    inner_steps: int | None = None
    frames: int | None = None
    size: tuple[int, int] | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    shift: float | None = None
    schedule: Sequence[float] | None = None
    deadline: float | None = None
    strength: float | None = None
    label: int | None = None
    rho: float | None = None
    fps: int | None = None


def check_types(wishes: Wishes) -> None:
    """Raises UsageFailure for a wish that is of another type than it should be, or not finite."""
    for name in ("seed", "steps", "inner_steps", "frames", "label", "fps"):
        _check(name, getattr(wishes, name), "a whole number", _is_whole)
    for name in ("guidance", "shift", "deadline", "strength", "rho"):
        _check(name, getattr(wishes, name), "a finite number", _is_finite)
    _check("negative_prompt", wishes.negative_prompt, "a text", lambda value: isinstance(value, str))
    if wishes.negative_prompt is not None and not is_utf8(wishes.negative_prompt):
        raise UsageFailure(f"the negative prompt {NOT_UTF_8}")
    _check("size", wishes.size, "two whole numbers, (width, height)", lambda value: _are(value, _is_whole, 2))
    _check("schedule", wishes.schedule, "a list of finite numbers", lambda value: _are(value, _is_finite))


def _check(name: str, value: object, what: str, holds: Callable[[Any], bool]) -> None:
    if value is not None and not holds(value):
        shown = ascii(value)
        raise UsageFailure(f"{name} must be {what}, not {shown if len(shown) <= 40 else shown[:40] + '...'}.")


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool | str | bytes):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError, ValueError):
        return False


def _are(values: Any, holds: Callable[[Any], bool], count: int | None = None) -> bool:
    if isinstance(values, str | bytes) or not hasattr(values, "__len__") or not hasattr(values, "__iter__"):
        return False
    return (count is None or len(values) == count) and all(map(holds, values))


@dataclass(frozen=True)
class Settings:
    """One run, checked. `width` and `height` in pixels, `fps` in 1/s; `nfe` counts evaluations of the whole model.

    `inner_steps` is 1 for a model without inner flow. `times`, falling to 0, are those of a model that steps through a
    list of them. A `guidance` other than 1 takes the model a second time per step, with `negative_prompt`. `strength`
    is the first time of a run that starts from a picture, `label` the class to draw. A run with a `deadline`, in
    seconds, may take fewer steps. `rho` is how much of the noise in x a step between the first and the last replaces.
    A family adds what only its own loop reads.
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
    rule: str = "euler"
    guidance: float = 1.0
    negative_prompt: str = ""
    times: tuple[float, ...] = ()
    strength: float | None = None
    label: int | None = None
    deadline: float | None = None
    rho: float = 0.0

    @property
    def passes(self) -> int:
        """Evaluations of the model per step."""
        return 1 if self.guidance == 1 else 2

    @property
    def details(self) -> dict[str, str]:
        """What files say of such a run beside its prompt, seed, steps and guidance, in words."""
        return {}

    def through(self, times: tuple[float, ...]) -> Self:
        """The settings of what a run came to that went through these times (none: it had no say in them)."""
        return self if times in ((), self.times) else replace(self, times=times, steps=len(times) - 1)
