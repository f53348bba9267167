"""What a run reports while it goes on: seconds per stage, steps to the caller's callback, and a stage that failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .errors import Cancelled, RuntimeFailure

if TYPE_CHECKING:
    from collections.abc import Iterator

STAGES = ("load", "text", "noise", "backbone", "flow_head", "decode")
"""The stages of every run, as its report lists them. The update of the latents belongs to `flow_head`."""
ENCODE = "encode"
"""The stage of runs that start from a picture, after the others."""


class StepInfo(NamedTuple):
    """What the callback gets after each step: `done` of `total` steps of `stage` are over, the last took `seconds`.

    Stages: `load` (an engine was loaded), `text`, `backbone` (outer steps), `flow_head` (inner steps), `decode`
    (latent frames), `encode` (the picture that the run starts from).
    """

    stage: str
    done: int
    total: int
    seconds: float


# Returns False to stop the run; None (no return statement) and True let it go on.
Callback = Callable[[StepInfo], "bool | None"]


def no_seconds() -> dict[str, float]:
    """Seconds per stage of a run that has not begun."""
    return dict.fromkeys(STAGES, 0.0)


class Timings:
    """Adds up the seconds of each stage of one run, and reports its steps to the callback, which may stop it."""

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
        """Tells the callback that a step is over. Raises Cancelled if it returns False."""
        if self._callback is None:
            return
        answer = self._callback(StepInfo(stage, done, total, seconds))
        if answer is not None and not answer:
            raise Cancelled(f"the run was stopped by its callback after step {done} of {total} of the stage {stage}.")


def check_finite(stage: str, values: Any) -> None:
    """Raises RuntimeFailure naming the stage if `values`, an array of the host or of a device, hold NaN or Inf."""
    if not is_finite(values):
        raise not_finite(stage)


def is_finite(values: Any) -> bool:
    """Whether an array of the host or of a device holds neither NaN nor Inf."""
    # The sum is NaN or Inf exactly if one of them is (float32 cannot overflow float64), and needs no array of flags.
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(np.sum(np.asarray(values), dtype=np.float64)))


def not_finite(stage: str) -> RuntimeFailure:
    return RuntimeFailure(
        f"the stage {stage} gave NaN or Inf: there is no video to show. Try another engine or a bundle of higher "
        "precision (fp32); if it stays, the weights are damaged: export the bundle again."
    )
