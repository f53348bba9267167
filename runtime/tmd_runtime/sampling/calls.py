"""How a loop calls its graphs: timed by stage, counted for the callback, and in one launch where the engines can.

A loop writes an outer step down once, as a function of `call`:

    def transition(call: Call) -> None:
        call("backbone", backbone)
        for j in range(inner, 0, -1):
            call("flow_head", flow_head(j))
        call("flow_head", update, counts=False)

`Calls` runs it call by call. An engine that records runs it so once, and from then on as one launch (`Launches`).
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from .noise import NoiseStream

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tmd_engines import Engine, Step

    from ..clock import Timings


class Call(Protocol):
    """Runs a bound step as part of a stage; one that `counts` is a step of the stage to whoever watches."""

    def __call__(self, stage: str, step: Callable[[], object], counts: bool = True) -> None: ...


class Draws:
    """The noise of one run, from its seed's stream. Its draws count as the stage `noise`."""

    def __init__(self, seed: int, shape: Sequence[int], timings: Timings) -> None:
        self._stream, self._shape, self._timings = NoiseStream(seed), shape, timings

    def into(self, buffer: Any, deviation: float = 1.0) -> None:
        """Fills a buffer with the next draw, of this deviation; one of several rows with the same in each."""
        with self._timings.stage("noise"):
            noise = self._stream.normal(self._shape)
            if deviation != 1:
                noise *= np.float32(deviation)
            buffer[...] = noise


class Calls:
    """The calls of one run. `totals` are the steps of its stages, for whoever watches."""

    def __init__(self, timings: Timings, **totals: int) -> None:
        self.timings, self._totals = timings, totals
        self._done = dict.fromkeys(totals, 0)

    def __call__(self, stage: str, step: Callable[[], object], counts: bool = True) -> None:
        """See `Call`. Raises Cancelled if the callback wants no more."""
        start = perf_counter()
        step()
        self.took(stage, perf_counter() - start, counts)

    def expect(self, stage: str, total: int) -> None:
        """Another number of steps of a stage, where they turn out to be more or fewer."""
        self._totals[stage] = total

    def took(self, stage: str, seconds: float, counts: int) -> None:
        """Notes time that a stage took for so many of its steps, which are over."""
        self.timings.add(stage, seconds)
        if counts:
            self._done[stage] += counts
            self.timings.report(stage, self._done[stage], self._totals[stage], seconds)


class _Recorded(NamedTuple):
    """One launch, the steps that it makes of each stage, and the stages' shares of its time."""

    key: object
    launch: Step
    steps: dict[str, int]
    shares: dict[str, float]


class Launches:
    """Runs a piece of a loop call by call, or as one launch where all its engines record; keeps the latest launch."""

    def __init__(self, *engines: Engine) -> None:
        self._engine = engines[0] if all(engine.records for engine in engines) else None
        self._recorded: _Recorded | None = None

    @property
    def records(self) -> bool:
        """Whether pieces become launches: what they write then must lie in buffers of its own."""
        return self._engine is not None

    def run(self, calls: Calls, piece: Callable[[Call], None], key: object = None) -> None:
        """Runs `piece`; pieces of the same `key` make the same calls on the same buffers.

        A launch cannot be timed within: each stage gets the share that it had when the piece ran call by call.
        """
        if self._recorded is not None and self._recorded.key == key:
            self._launch(calls, self._recorded)
        elif self._engine is None:
            piece(calls)
        else:
            self._recorded = self._record(self._engine, calls, piece, key)

    def _launch(self, calls: Calls, recorded: _Recorded) -> None:
        start = perf_counter()
        recorded.launch()
        seconds = perf_counter() - start
        for stage, share in recorded.shares.items():
            calls.took(stage, seconds * share, recorded.steps[stage])

    def _record(self, engine: Engine, calls: Calls, piece: Callable[[Call], None], key: object) -> _Recorded:
        steps: dict[str, int] = {}
        before = dict(calls.timings.seconds)

        def counted(stage: str, step: Callable[[], object], counts: bool = True) -> None:
            steps[stage] = steps.get(stage, 0) + counts
            calls(stage, step, counts)

        def bare(stage: str, step: Callable[[], object], counts: bool = True) -> None:
            step()

        piece(counted)
        took = {stage: calls.timings.seconds[stage] - before.get(stage, 0.0) for stage in steps}
        shares = {stage: seconds / (sum(took.values()) or 1.0) for stage, seconds in took.items()}
        return _Recorded(key, engine.record(lambda: piece(bare)), steps, shares)
