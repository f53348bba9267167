"""Which layers a precision hurts, and which of them stay out of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from ..graphs.accuracy import cosine
from .calibration import Sensitivity
from .passes import Pass

GOAL = 0.05
"""Relative L2 error of a graph's result that quantization may make: a cosine of about 0.9987."""

LEAST_COSINE = 0.992
"""Of any one pass. The export's gate is 0.99, and the written graph also rounds what is between its products."""

SLACK = 0.05  # of the goal that may stay unused where a trial takes long
TRIES = 6  # of numbers that the table tells, before half of those in question are taken

Arrays = Mapping[str, np.ndarray]


def measure(
    compute: Callable[[Arrays, Collection[str]], Arrays],
    passes: Sequence[Pass],
    contributions: Callable[[], Mapping[str, float]] | None,
    always: bool = True,
    goal: float = GOAL,
    others: Sequence[Pass] = (),
) -> Sensitivity:
    """The table of layers, and those of them to keep.

    `compute`: inputs and the layers to keep in high precision -> outputs. `passes`: inputs, and outputs in float32.
    `contributions` makes the table (see `Contributions`); None: there is no table, and nothing is kept. The worst
    layers by it stay in high precision, as few as leave the rest within `goal`, and no call of `passes` or `others`
    below `LEAST_COSINE`: their number is estimated from the table and confirmed by the error of all others together.
    `always`: make the table even if nothing needs to be kept, and try until none of the kept layers could be spared;
    otherwise some can be kept in vain.
    """
    relative: dict[int, float] = {}  # by the number of layers kept

    def error(kept: Sequence[str]) -> float:
        """Of all `passes` together; or of the worst call, if that is worse, by the same measure."""
        relative[len(kept)], worst = _errors(compute, kept, passes, others)
        return max(relative[len(kept)], worst / _tangent(LEAST_COSINE) * goal)

    everything = error(())
    needed = everything > goal
    if contributions is None or not (needed or always):
        return Sensitivity(everything=relative[0], chosen=relative[0], layers={}, kept=())
    table = dict(contributions())
    ranked = sorted(table, key=table.__getitem__, reverse=True)
    search = _Search([table[layer] for layer in ranked], everything, goal, 0.0 if always else SLACK)
    count, _ = search(lambda count: error(ranked[:count]))
    return Sensitivity(everything=relative[0], chosen=relative[count], layers=table, kept=tuple(ranked[:count]))


def _errors(
    compute: Callable[[Arrays, Collection[str]], Arrays],
    kept: Collection[str],
    passes: Sequence[Pass],
    others: Sequence[Pass],
) -> tuple[float, float]:
    """Relative L2 error of all `passes` together, and the tangent of the largest angle in any call of all."""
    difference = total = worst = 0.0
    for number, (inputs, outputs, calls) in enumerate((*passes, *others)):
        found = compute(inputs, kept)
        for name, expected in outputs.items():
            if number < len(passes):
                difference += float(np.square(found[name] - expected, dtype=np.float64).sum())
                total += float(np.square(expected, dtype=np.float64).sum())
            pairs = zip(np.split(found[name], calls), np.split(expected, calls), strict=True)
            worst = max(worst, *(_tangent(cosine(one, other)) for one, other in pairs))
    return (difference / total) ** 0.5, worst


def _tangent(cosine: float) -> float:
    """Of the angle: the relative L2 error, as far as it turns the result and does not scale it."""
    return (1 / cosine**2 - 1) ** 0.5 if 0 < cosine < 1 else (0.0 if cosine >= 1 else np.inf)


class _Search:
    """For the fewest layers to keep, of those that the table has first, that leave the error within `goal`.

    `parts`: contribution of each layer, the largest first. Their squares tell what is left, but for a factor that the
    latest trial gives. An error from 1 - `slack` of the goal on ends the search.
    """

    def __init__(self, parts: Sequence[float], everything: float, goal: float, slack: float) -> None:
        squares = np.square(parts)
        rest = np.maximum(squares.sum() - np.concatenate(([0.0], np.cumsum(squares))), 0.0)
        self._rest = rest * (everything**2 / rest[0] if rest[0] else 1.0)  # by the number of layers kept
        self._everything, self._goal, self._slack = everything, goal, slack

    def __call__(self, error: Callable[[int], float]) -> tuple[int, float]:
        """The number, and the error that it leaves. `error`: number of layers kept -> error of the rest."""
        if self._everything <= self._goal:
            return 0, self._everything
        few, many, found, factor = 0, len(self._rest) - 1, None, 1.0
        for trial in itertools.count():
            count = self._guess(factor) if trial < TRIES else (few + many) // 2
            count = min(max(count, few + 1), many if found is None else many - 1)
            left = error(count)
            if left <= self._goal or count == len(self._rest) - 1:
                many, found = count, (count, left)
            else:
                few = count
            if found and (many - few == 1 or (self._slack and found[1] >= (1 - self._slack) * self._goal)):
                return found
            factor = left**2 / self._rest[count] if self._rest[count] else factor
        raise AssertionError("the search ends")

    def _guess(self, factor: float) -> int:
        aim = (1 - self._slack / 2) * self._goal
        return int(np.argmax(self._rest * factor <= aim**2))
