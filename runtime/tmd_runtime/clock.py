"""What a run tells while it goes: seconds per stage, steps to the caller's callback, and a stage that failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import Cancelled, RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


class StepInfo(NamedTuple):
    """Told to the callback after each step: `done` of `total` steps of `stage` are over, the last one took `seconds`.

    Stages: `load` (an engine was loaded), `text`, `backbone` (outer steps), `flow_head` (inner steps), `decode`
    (latent frames).
    """

    stage: str
    done: int
    total: int
    seconds: float


# Returns False to stop the run; None (no return statement) and True let it go on.
Callback = Callable[[StepInfo], "bool | None"]


class Timings:
    """Seconds per stage of one run, and the callback's voice in it."""

    def __init__(self, callback: Callback | None = None, seconds: dict[str, float] | None = None) -> None:
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self._callback = callback

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextmanager
    def stage(self, stage: str) -> Iterator[None]:
        start = perf_counter()
        yield
        self.add(stage, perf_counter() - start)

    def report(self, stage: str, done: int, total: int, seconds: float) -> None:
        """A step is over. Raises Cancelled if the callback wants no more."""
        if self._callback is None:
            return
        answer = self._callback(StepInfo(stage, done, total, seconds))
        if answer is not None and not answer:
            raise Cancelled(f"the run was stopped by its callback after step {done} of {total} of the stage {stage}.")


def check_finite(stage: str, values: NDArray[Any]) -> None:
    """Raises RuntimeFailure naming the stage if `values` hold NaN or Inf."""
    # The sum is NaN or Inf exactly if one of them is (float32 cannot overflow float64), and needs no array of flags.
    with np.errstate(invalid="ignore"):
        total = float(np.sum(values, dtype=np.float64))
    if not np.isfinite(total):
        raise RuntimeFailure(
            f"the stage {stage} gave NaN or Inf: there is no video to show. Try another engine or a bundle of higher "
            "precision (fp32); if it stays, the weights are damaged: export the bundle again."
        )
