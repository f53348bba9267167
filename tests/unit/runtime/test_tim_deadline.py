"""Which steps a Transition Model takes within a deadline, on a clock that only its steps move on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tmd_runtime import StepInfo
from tmd_runtime.clock import Timings
from tmd_runtime.sampling.deadline import StepTimes, steps_in_time
from tmd_runtime.sampling.tim import TimLoop
from tmd_runtime.sampling.tim_settings import TimSettings


class Clock:
    """A clock that only steps move on, by what `cost` says of the number of rows and of the steps so far."""

    def __init__(self, cost: Callable[[int, int], float]) -> None:
        self.now, self.steps, self._cost = 100.0, 0, cost

    def __call__(self) -> float:
        return self.now

    def step(self, rows: int) -> None:
        self.now += self._cost(rows, self.steps)
        self.steps += 1


class StillEngine:
    """An engine that does nothing but move the clock on, for each step of the flow head."""

    records = False

    def __init__(self, clock: Clock) -> None:
        self._clock, self.inputs = clock, {"prompt_embeds": None}

    def empty(self, name: str, *, batch: int = 1, **_: int) -> np.ndarray:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("x", "x_next", "noise", "data"), (batch, 4, 1, 2, 2))
        shapes |= {"guidance": (batch, batch), "coefficients": (7,), "magnitude": (1,)}
        shapes |= {"prompt_embeds": (batch, 3, 8), "context": (batch, 1), "t": (batch,), "r": (batch,)}
        return np.zeros(shapes.get(name, (4, 4)), np.float32)

    def bind(self, inputs: dict[str, Any], outputs: dict[str, Any]) -> Callable[[], None]:
        self._clock.now += 7.0  # as an engine that compiles for a shape
        rows = len(outputs["x_next"]) if "r" in inputs else 0
        return lambda: self._clock.step(rows) if rows else None


def still_loop(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> TimLoop:
    for module in ("clock", "sampling.calls", "sampling.tim"):
        monkeypatch.setattr(f"tmd_runtime.{module}.perf_counter", clock)
    model = SimpleNamespace(patch_size=(1, 1, 1), head_dim=8, rope="index")
    engine: Any = StillEngine(clock)
    manifest: Any = SimpleNamespace(model=model)
    return TimLoop(engine, engine, engine, manifest, (1, 4, 1, 2, 2), 3)


def limited(
    seconds: float, times: tuple[float, ...] | None = None, guidance: float = 1.0, most: int = 1000
) -> TimSettings:
    grid = tuple(1 - k / most for k in range(most + 1))
    return TimSettings(
        0, most, 1, 1, 16, 16, 1, 0.0, (1, 4, 1, 2, 2), rule="flow_map", guidance=guidance, deadline=seconds,
        times=times or grid, scheduled=times is not None,
    )  # fmt: skip


def spend(loop: TimLoop, clock: Clock, settings: TimSettings) -> tuple[float, list[StepInfo], tuple[float, ...]]:
    """Seconds that a run took apart from measuring, what its callback heard, and the times of its steps."""
    embeds = np.zeros((1, 3, 8), np.float32)
    heard: list[StepInfo] = []
    timings = Timings(heard.append)
    before = clock.now
    made = loop.run(embeds, settings, timings, None if settings.guidance == 1 else embeds)
    return clock.now - before - timings.seconds["load"], heard, made.times


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.25, 1), (1.0, 1), (1.9, 1), (2.0, 2), (7.75, 7), (8.0, 8), (5000.0, 1000)]
)
def test_as_many_equal_steps_as_fit(monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int) -> None:
    clock = Clock(lambda rows, step: 1.0)
    loop = still_loop(clock, monkeypatch)
    took, heard, times = spend(loop, clock, limited(seconds))
    assert took == steps and len(times) == steps + 1
    np.testing.assert_allclose(times, np.linspace(1, 0, steps + 1), atol=1e-12)
    heads = [(info.done, info.total) for info in heard if info.stage == "flow_head"]
    assert heads == [(k, steps) for k in range(1, steps + 1)], "the steps to come are told right"
    measured = 1 if seconds > 10 else 2
    assert clock.steps == steps + measured, "before the first run, to know what a step takes"
    spend(loop, clock, limited(seconds))
    assert clock.steps == 2 * steps + measured


def test_a_slow_first_step_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines allocate, and some compile, in their very first step."""
    clock = Clock(lambda rows, step: 30.0 if step == 0 else 1.0)
    loop = still_loop(clock, monkeypatch)
    took, _, times = spend(loop, clock, limited(8.0))
    assert took == 8 and len(times) == 9


class Load:
    """A load that comes and goes: a step takes at most twice the slower of the two before it, one of two rows twice."""

    def __init__(self, seed: int) -> None:
        self._rng, self.taken = np.random.default_rng(seed), [1.0, 1.0]

    def __call__(self, rows: int, step: int) -> float:
        wanted = self.taken[-1] * self._rng.uniform(0.5, 2.5)
        self.taken.append(float(np.clip(wanted, 0.1, min(10.0, 2 * max(self.taken[-2:])))))
        return self.taken[-1] * rows


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("deadline", [0.5, 2.0, 10.0, 60.0])
def test_a_deadline_is_kept_within_a_step_whatever_the_load_does(
    monkeypatch: pytest.MonkeyPatch, deadline: float, guidance: float
) -> None:
    load = Load(round(deadline))
    clock = Clock(load)
    loop = still_loop(clock, monkeypatch)
    counts = []
    for _ in range(20):
        took, _, times = spend(loop, clock, limited(deadline, guidance=guidance))
        rows = 2 if len(times) > 2 and guidance != 1 else 1
        assert took <= deadline + rows * load.taken[-1] + 1e-9, "late by the jump at most"
        assert times[0] == 1 and times[-1] == 0
        assert all(later < earlier for earlier, later in pairwise(times))
        counts.append(len(times) - 1)
    assert deadline < 60 or np.mean(counts) > 3


def test_a_schedule_is_followed_while_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = (1.0, 0.9, 0.7, 0.4, 0.0)
    clock = Clock(lambda rows, step: 1.0)
    loop = still_loop(clock, monkeypatch)
    for seconds, times in ((3.5, (1.0, 0.9, 0.7, 0.0)), (4.0, schedule), (99.0, schedule), (0.1, (1.0, 0.0))):
        assert spend(loop, clock, limited(seconds, schedule))[2] == times


def test_steps_are_the_most_that_a_deadline_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda rows, step: 0.0)
    loop = still_loop(clock, monkeypatch)
    times = spend(loop, clock, limited(5.0, most=6))[2]
    np.testing.assert_allclose(times, np.linspace(1, 0, 7), atol=1e-12)


def test_the_slower_of_two_steps_counts_and_old_ones_are_forgotten() -> None:
    seen = StepTimes()
    assert not seen.knows(1)
    for seconds in (9.0, 1.0, 2.0):
        seen.add(1, seconds)
    assert seen[1] == 2.0 and seen.knows(1) and not seen.knows(2)
    # A step that takes all the time there is: the next one is the jump.
    left = iter([10.0, -3.0])
    assert list(steps_in_time((1.0, 0.5, 0.0), False, lambda: next(left), lambda t: (1.0, 1.0))) == [
        (1.0, 0.5),
        (0.5, 0.0),
    ]
