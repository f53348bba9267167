"""Which steps a model takes that jumps from any time to any earlier one, when the time is limited: as many as fit, and
the last one goes to 0."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Clock = Callable[[], float]

_SHORTEST = 1e-6  # seconds; nothing is faster, whatever a clock says


class StepTimes:
    """What steps have cost lately, by their number of rows: the slower one of the latest two counts, in seconds."""

    def __init__(self) -> None:
        self._seconds: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=2))

    def add(self, rows: int, seconds: float) -> None:
        self._seconds[rows].append(seconds)

    def knows(self, rows: int) -> bool:
        return bool(self._seconds[rows])

    def measure(self, kinds: Iterable[int], deadline: float, step: Callable[[int], object], clock: Clock) -> float:
        """Takes the steps of those `kinds` (numbers of rows) whose cost is not known. Returns the seconds spent."""

        def cost(rows: int) -> float:
            start = clock()
            step(rows)
            return clock() - start

        start = clock()
        for rows in kinds:
            if not self.knows(rows):
                first = cost(rows)
                # The very first one may be slow for reasons that do not come back, and here it would decide.
                self.add(rows, cost(rows) if first > deadline / 10 else first)
        return clock() - start

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


def steps_ahead(t: float, r: float, done: int, steps: int, planned: bool) -> int:
    """How many steps will follow the one from t to r, which is number `done` of `steps`; of a run whose steps are
    `planned` as it goes, as far as one can say."""
    if r == 0:
        return 0
    return round(r / (t - r)) if planned else steps - done
