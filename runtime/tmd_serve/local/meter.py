"""How far a run is: steps of stages -> a fraction of the whole, and the seconds that remain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING

from ..jobs import Progress

if TYPE_CHECKING:
    from tmd_runtime import StepInfo

# Shares of stages before a run of this kind has been measured.
_SHARES = {"encode": 0.05, "text": 0.05, "backbone": 0.4, "flow_head": 0.3, "decode": 0.2}
_SURE = 0.2  # from this fraction on the run itself says how fast it is


class Meter:
    """A callback for a pipeline. `totals` are the steps by stage; `seconds` what the stages of the latest run of this
    kind took; `estimated` is the time of the whole run. `show(progress)` returns False to stop the run."""

    def __init__(
        self,
        totals: Mapping[str, int],
        seconds: Mapping[str, float] | None,
        estimated: float | None,
        show: Callable[[Progress], bool],
    ) -> None:
        shares = {stage: (_SHARES if seconds is None else seconds).get(stage, 0.0) for stage in totals}
        whole = sum(shares.values()) or 1.0
        self._shares = {stage: share / whole for stage, share in shares.items()}
        self._done = dict.fromkeys(totals, 0.0)
        self._estimated, self._show, self._start = estimated, show, monotonic()
        self._loading = 0.0

    def __call__(self, step: StepInfo) -> bool:
        if step.stage == "load":
            self._loading += step.seconds
        elif step.stage in self._done:
            self._done[step.stage] = step.done / max(step.total, 1)
        fraction = min(sum(self._shares[stage] * done for stage, done in self._done.items()), 1.0)
        return self._show(Progress(step.stage, step.done, step.total, fraction, self._left(fraction)))

    def _left(self, fraction: float) -> float | None:
        spent = max(monotonic() - self._start - self._loading, 0.0)
        if fraction >= _SURE:
            return round(spent * (1 - fraction) / fraction, 2)
        return None if self._estimated is None else round(max(self._estimated - spent, 0.0), 2)
