"""How far a TensorRT build is, from the phases that it reports: nested, each with a number of steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import perf_counter

from ..engine import BuildStep, Progress


class BuildProgress:
    """Gathers phases, tells `progress`. Its methods are those of TensorRT's IProgressMonitor, from any thread."""

    def __init__(self, graph: str, progress: Progress | None, clock: Callable[[], float] = perf_counter) -> None:
        self._graph, self._progress, self._clock = graph, progress, clock
        self._start, self._told = clock(), 0.0
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self.stopped: BaseException | None = None  # what `progress` raised, to end the build with

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase of `num_steps` begins inside `parent_phase`, or on its own."""
        with self._lock:
            self._phases[phase_name] = _Phase(parent_phase, max(1, num_steps))

    def step_complete(self, phase_name: str, step: int) -> bool:
        """Step `step`, counted from 0, is over. False asks TensorRT to stop."""
        with self._lock:
            if phase_name in self._phases:
                self._phases[phase_name].done = step + 1
            self._told = max(self._told, min(1.0, self._fraction()))  # never back: a phase may follow another
            fraction, seconds = self._told, self._clock() - self._start
        left = seconds * (1 - fraction) / fraction if fraction > 0.02 else None
        try:
            if self._progress is not None and self.stopped is None:
                self._progress(BuildStep(self._graph, fraction, seconds, left))
        except BaseException as error:  # it must not pass through TensorRT's C++
            self.stopped = error
        return self.stopped is None

    def phase_finish(self, phase_name: str) -> None:
        """A phase is over; it counts for its parent when that completes a step."""
        with self._lock:
            self._phases.pop(phase_name, None)

    def say(self, message: str) -> None:
        """A word to people, once."""
        if self._progress is not None:
            self._progress(BuildStep(self._graph, self._told, self._clock() - self._start, None, message))

    def _fraction(self) -> float:
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        return self._share(roots[-1]) if roots else 0.0

    def _share(self, name: str) -> float:
        phase = self._phases[name]
        inside = sum(self._share(child) for child, other in self._phases.items() if other.parent == name)
        return min(1.0, (phase.done + min(1.0, inside)) / phase.steps)


class _Phase:
    def __init__(self, parent: str | None, steps: int) -> None:
        self.parent, self.steps, self.done = parent, steps, 0
