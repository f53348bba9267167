"""The contenders side by side: their processes, the rounds, the statistics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmd_runtime.errors import RuntimeFailure

from .spec import NO_WARM_UP, Work

THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class BenchError(RuntimeFailure):
    """The measurement cannot be made; the message says why and what helps."""


@dataclass
class Entry:
    """What one contender showed. Seconds: by stage, of loading, of the first run (cold) and of every later one."""

    name: str
    load: dict[str, float] = field(default_factory=dict)
    cold: dict[str, float] = field(default_factory=dict)
    rounds: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0
    peak_anonymous_bytes: int = 0

    def median(self, stage: str) -> float:
        return float(np.median([one[stage] for one in self.rounds]))

    def summary(self) -> dict[str, Any]:
        stages = dict.fromkeys(stage for one in self.rounds for stage in one)
        warm = {
            stage: {"median": self.median(stage), "p90": float(np.percentile([r[stage] for r in self.rounds], 90))}
            for stage in stages
        }
        return {"load_seconds": self.load, "cold_seconds": self.cold, "seconds": warm, "peak_bytes": self.peak_bytes,
                "peak_anonymous_bytes": self.peak_anonymous_bytes, "rounds": self.rounds}  # fmt: skip


class _Process:
    def __init__(self, name: str, work: Work) -> None:
        self.entry = Entry(name)
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up)
        environment = os.environ | {name: str(work.threads) for name in THREAD_VARIABLES}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tmd_bench.worker", name, work.to_json()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._complaints, text=True, env=environment,
        )  # fmt: skip

    def ask(self, what: str) -> dict[str, float]:
        """Seconds by stage. Raises BenchError if the contender fails or its process dies."""
        process, name = self._process, self.entry.name
        assert process.stdin and process.stdout  # both are pipes
        line = ""
        try:
            process.stdin.write(what + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            code = process.wait()
            self._complaints.seek(0)
            last = self._complaints.read().strip().splitlines()
            how = last[-1] if last else f"exit code {code}"
            raise BenchError(f"the process of {name} ended while it should {what} ({how}): is there memory enough?")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(f"{name} cannot {what}: {answer['error']}")
        self.entry.peak_bytes, self.entry.peak_anonymous_bytes = answer["peak_bytes"], answer["peak_anonymous_bytes"]
        seconds: dict[str, float] = answer["seconds"]
        return seconds

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._complaints.close()


def contest(
    names: Sequence[str],
    work: Work,
    rounds: int,
    report: Callable[[str], None] = lambda line: None,
    *,
    apart: bool = False,
) -> dict[str, Entry]:
    """Load every contender, run each once cold, then `rounds` times in turn. Raises BenchError.

    `apart`: one contender is loaded and runs all its rounds before the next one loads.
    """
    if apart:
        entries: dict[str, Entry] = {}
        for name in names:
            entries |= contest([name], work, rounds, report)
        return entries
    processes: list[_Process] = []
    try:
        for name in names:
            processes.append(_Process(name, work))
            report(f"{name}: loading")
            processes[-1].entry.load = processes[-1].ask("load")
            report(f"{name}: first run")
            entry = processes[-1].entry
            entry.cold = processes[-1].ask("run")
            if name in NO_WARM_UP:
                entry.rounds.append(entry.cold)
        for number in range(rounds):
            # every other round backwards, so that nobody always comes after the same one
            for process in processes if number % 2 == 0 else reversed(processes):
                if len(process.entry.rounds) > number:
                    continue
                report(f"round {number + 1} of {rounds}: {process.entry.name}")
                process.entry.rounds.append(process.ask("run"))
    finally:
        for process in processes:
            process.close()
    return {process.entry.name: process.entry for process in processes}
