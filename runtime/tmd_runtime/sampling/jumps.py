"""Settings of models that jump from any time to any earlier one: a number of steps, a list of times, a deadline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Self

from ..errors import UsageFailure
from ..settings import MAX_STEPS, Settings, Wishes

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_DEADLINE = 86400  # a day, in seconds


@dataclass(frozen=True)
class JumpSettings(Settings):
    """With a `deadline`, `times` are the finest that the run may take, or, if `scheduled`, those that it shall take as
    long as it can."""

    scheduled: bool = False

    def evaluations(self, t: float) -> int:
        """How often the step from time t takes the model."""
        return self.passes

    def through(self, times: tuple[float, ...]) -> Self:
        """See `Settings.through`: the run that a deadline made of these settings."""
        return replace(self, times=times, steps=len(times) - 1, nfe=float(sum(map(self.evaluations, times[:-1]))))

    @property
    def details(self) -> dict[str, str]:
        """The schedule, if it is not the model's own."""
        chosen = self.scheduled or self.deadline is not None
        return {"schedule": ",".join(map(repr, self.times))} if chosen else {}


def check_deadline(wishes: Wishes) -> None:
    """Raises UsageFailure for a deadline out of range."""
    if wishes.deadline is not None and not 0 < wishes.deadline <= MAX_DEADLINE:
        raise UsageFailure(
            f"a deadline of {wishes.deadline:g} s is out of range: choose above 0, up to {MAX_DEADLINE}."
        )


def jump_times(
    default: int, wishes: Wishes, grid: Callable[[int], NDArray], start: float = 1.0, ends: str = "the video"
) -> tuple[float, ...]:
    """The times of the run, falling from `start` to 0, which `ends` with: `grid(steps)`, or the wished schedule. A
    deadline alone allows the most steps. Raises UsageFailure."""
    schedule: Sequence[float] | None = wishes.schedule
    if schedule is not None and wishes.steps is not None:
        raise UsageFailure("a schedule says how many steps there are: leave the steps out.")
    steps = wishes.steps
    if steps is None:
        steps = default if wishes.deadline is None else MAX_STEPS
    count = steps if schedule is None else len(schedule) - 1
    if count > MAX_STEPS or (count < 1 and schedule is None):
        raise UsageFailure(f"{count} steps cannot be done: choose 1 to {MAX_STEPS} (default {default}).")
    times = tuple(map(float, grid(count) if schedule is None else schedule))
    falls = all(later < earlier for earlier, later in pairwise(times))
    if len(times) < 2 or times[0] != start or times[-1] != 0 or not falls:
        where = "1 (noise)" if wishes.strength is None else f"{start:g} (the strength)"
        example = ",".join(f"{start * share:g}" for share in (1, 0.6, 0.2, 0))
        raise UsageFailure(f"the times of a schedule must fall from {where} to 0 ({ends}), such as {example}.")
    return times
