"""What a run of a Transition Model shall do: steps or a list of times, guidance in a part of them, rho, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tmd_engines.bundle.families.tim import MAX_RHO

from ..errors import UsageFailure
from ..settings import Wishes
from .family import check_guidance, common_settings
from .jumps import JumpSettings, check_deadline, jump_times
from .schedule import uniform_times

if TYPE_CHECKING:
    from tmd_engines import Manifest


@dataclass(frozen=True)
class TimSettings(JumpSettings):
    """Guidance takes part in the steps from a time inside `guidance_interval`, without its ends."""

    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def guided(self, t: float) -> bool:
        """Whether the step from time t takes guidance."""
        low, high = self.guidance_interval
        return self.guidance != 1 and low < t < high

    def evaluations(self, t: float) -> int:
        return 1 + self.guided(t)

    @property
    def details(self) -> dict[str, str]:
        """Class, rho, strength and schedule, as far as the run has them."""
        found: dict[str, str] = {}
        if self.label is not None:
            found["class"] = str(self.label)
        if self.rho:
            found["rho"] = f"{self.rho:g}"
        if self.strength is not None:
            found["strength"] = f"{self.strength:g}"
        return found | super().details


def tim_settings(manifest: Manifest, wishes: Wishes) -> TimSettings:
    """The wishes, completed from the manifest. Raises UsageFailure that says what the model can do."""
    sampler: Any = manifest.sampler
    _refuse(wishes)
    start = 1.0 if wishes.strength is None else float(wishes.strength)
    if not 0 < start <= 1:
        raise UsageFailure(f"a strength of {start:g} is out of range: choose above 0 (keeps the picture) and up to 1.")
    times = jump_times(sampler.steps, wishes, lambda count: start * uniform_times(count), start, "the picture")
    steps = len(times) - 1
    guidance, negative_prompt, warnings = _guidance(sampler, wishes, times)
    if wishes.rho is not None and not 0 <= wishes.rho <= MAX_RHO:
        raise UsageFailure(f"a rho of {wishes.rho:g} is out of range: choose 0 (no fresh noise) to {MAX_RHO:g}.")
    rho = sampler.rho if wishes.rho is None else wishes.rho
    if steps < 3:
        rho = 0.0
        if wishes.rho:
            between = f"{steps} steps have none between the first and the last, where rho adds noise: there is none."
            warnings = (between, *warnings)
    made = TimSettings(
        **common_settings(manifest, wishes, steps, passes=1 if guidance == 1 else 2, warnings=warnings),
        guidance=guidance,
        negative_prompt=negative_prompt,
        times=times,
        strength=wishes.strength,
        deadline=wishes.deadline,
        rho=rho,
        guidance_interval=sampler.guidance_interval,
        scheduled=wishes.schedule is not None,
    )
    return made.through(times)


def _refuse(wishes: Wishes) -> None:
    """Raises UsageFailure for a wish that no Transition Model grants."""
    inner_steps = None if wishes.inner_steps == 1 else wishes.inner_steps
    for what, value in (("inner steps", inner_steps), ("shift", wishes.shift)):
        if value is not None:
            raise UsageFailure(f"this model is a Transition Model, which has no {what}: leave it out.")
    if wishes.frames not in (None, 1):
        raise UsageFailure(f"this model makes stills, so it cannot do {wishes.frames} frames: leave them out.")
    if wishes.label is not None and wishes.negative_prompt is not None:
        raise UsageFailure("this model draws numbered classes, which have no negative prompt: leave it out.")
    check_deadline(wishes)


def _guidance(sampler: Any, wishes: Wishes, times: Sequence[float]) -> tuple[float, str, tuple[str, ...]]:
    """Guidance, negative prompt and warnings; without guidance if no step takes it."""
    check_guidance(wishes.guidance, wishes.negative_prompt, sampler.guidance)
    low, high = sampler.guidance_interval
    if not any(low < t < high for t in times[:-1]):
        if wishes.guidance in (None, 1) and wishes.negative_prompt is None:
            return 1.0, "", ()
        outside = f"no step begins at a time between {low:g} and {high:g}, where guidance takes part: there is none."
        return 1.0, "", (outside,)
    guidance = sampler.guidance if wishes.guidance is None else wishes.guidance
    negative = sampler.negative_prompt if wishes.negative_prompt is None else wishes.negative_prompt
    return guidance, negative or "", ()
