"""Which steps a Transition Model takes when the time is limited: as many as fit, and the last one jumps to 0."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SHORTEST = 1e-6  # seconds; nothing is faster, whatever a clock says


class StepTimes:
    """What steps have cost lately, by their number of rows: the slower one of the latest two counts, in seconds."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=2))

    def add(self, rows: int, seconds: float) -> None:
        self._seconds[rows].append(seconds)

    def knows(self, rows: int) -> bool:
        return bool(self._seconds[rows])

    def __getitem__(self, rows: int) -> float:
        return max(self._seconds[rows])


def steps_in_time(
    times: Sequence[float], fixed: bool, left: Callable[[], float], costs: Callable[[float], tuple[float, float]]
) -> Iterator[tuple[float, float]]:
    """Steps (t, r) from times[0] to 0, each decided when the one before is over.

    `left()` are the seconds that remain, `costs(t)` those that the step from t will take and the most that one after it
    will. While there is time for the step and one more, it goes to the next of `times` (`fixed`), or begins equal
    steps, as many as fit, at most as many as `times` has; otherwise it goes to 0. So the end is late by one step at
    most, unless a step takes more time than was left; then by what it took too much and one step.
    """
    t, most = times[0], len(times) - 1
    while t > 0:
        now, later = costs(t)
        spare = max(left() - now, 0.0)
        count = 1 + int(min(spare / max(later, _SHORTEST), most - 1))
        if count == 1:
            r = 0.0
        elif fixed:
            r = times[len(times) - most]
        else:
            r = t * (count - 1) / count
        yield t, r
        t, most = r, most - 1
