"""Where the numbers of a run go: JSON lines, TensorBoard if it is installed, a bar on a terminal or lines elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tmd_ref.distill.state import TrainingError


class Metrics:
    """Averages of named scalars over `every` steps, written as one line of `metrics.jsonl`.

    A scalar that not every step reports is averaged over the steps that do. A line belongs to the interval since the
    line before it; after an interruption lines may repeat a step, and the last one counts.
    """

    def __init__(
        self, run: Path, steps: int, done: int, every: int, report: Callable[[str], None], bar: bool | None = None
    ) -> None:
        self.steps, self.every, self.report = steps, every, report
        self._done = self._first = done
        self._sums: dict[str, tuple[float, int]] = {}
        self._began = time.monotonic()
        self._log = open(run / "metrics.jsonl", "a")  # noqa: SIM115 (closed by close)
        self._board = _tensorboard(run)
        wanted = sys.stderr.isatty() if bar is None else bar
        self._bar: Any = None
        self._task: Any = None
        if wanted:
            self._bar, self._task = _bar(steps, done)

    def add(self, scalars: Mapping[str, Tensor | float], **settings: float) -> None:
        """Take the scalars of the next step; `settings` (learning rates) are written as they are."""
        self._done += 1
        for name, value in scalars.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = total + float(value), count + 1
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        if self._done % self.every == 0 or self._done == self.steps:
            self._write(settings)

    def _write(self, settings: Mapping[str, float]) -> None:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        seconds = (time.monotonic() - self._began) / (self._done - self._first)
        line = {"step": self._done, **settings, "seconds_per_step": round(seconds, 4), **means}
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        except OSError as error:
            raise TrainingError(f"metrics could not be written ({error}); the last checkpoint is intact.") from error
        if self._board is not None:
            for name, value in means.items():
                self._board.add_scalar(name, value, self._done)
        text = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            left = seconds * (self.steps - self._done) / 60
            self.report(f"step {self._done}/{self.steps}  {text}  {seconds:.2f} s/step, {left:.0f} min left")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._log.close()
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.stop()


def _tensorboard(run: Path) -> Any:
    """A writer, or None where TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


def _bar(steps: int, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    progress = Progress(*columns, console=Console(stderr=True))
    progress.start()
    return progress, progress.add_task("", total=steps, completed=done)
