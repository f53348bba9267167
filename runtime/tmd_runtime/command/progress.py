"""What `tmd-run` shows people while it works, on stderr: a bar per stage in a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tmd_engines.command.screen import tell

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from tmd_engines import Manifest

    from ..clock import StepInfo
    from ..settings import Settings

LABELS = {
    "load": "load",
    "encode": "picture",
    "text": "text",
    "noise": "noise",
    "backbone": "backbone",
    "flow_head": "flow head",
    "decode": "decode",
    "file": "file",
}


def steps_of(manifest: Manifest, settings: Settings, reads: bool) -> dict[str, int]:
    """The steps of a run by stage, as far as they are known before; it `reads` a prompt or has its embeddings."""
    calls = manifest.family.calls(settings.steps, settings.inner_steps, settings.passes)
    text = {"text": settings.passes} if reads else {}
    return {**text, "backbone": calls.backbone, "flow_head": calls.flow_head, "decode": settings.latent_shape[2]}


def watch(totals: Mapping[str, int], quiet: bool) -> Bars | Lines:
    """A callback for `Pipeline` and context manager that shows the stages of `totals`; nothing if `quiet`."""
    return Bars(totals, visible=not quiet) if in_terminal() else Lines(visible=not quiet)


class Lines:
    """Prints a line when a stage is over."""

    def __init__(self, visible: bool) -> None:
        self._visible, self._seconds = visible, dict[str, float]()

    def __call__(self, step: StepInfo) -> None:
        self._seconds[step.stage] = self._seconds.get(step.stage, 0.0) + step.seconds
        if self._visible and step.done == step.total:
            steps = "" if step.total == 1 or step.stage == "load" else f"{step.total} steps, "
            tell(f"tmd-run: {LABELS[step.stage]}: {steps}{self._seconds[step.stage]:.2f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Bars:
    """A callback for `Pipeline` that draws a bar for each stage of `totals`; shows nothing if `visible` is False."""

    def __init__(self, totals: Mapping[str, int], visible: bool) -> None:
        self._progress: Any = None
        self._tasks: dict[str, Any] = {}
        if not visible:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._tasks = {
            stage: self._progress.add_task(LABELS[stage], total=total, start=False) for stage, total in totals.items()
        }

    def __call__(self, step: StepInfo) -> None:
        if self._progress is None:
            return
        if step.stage not in self._tasks:
            self._tasks[step.stage] = self._progress.add_task(LABELS[step.stage], total=step.total)
        task = self._tasks[step.stage]
        with suppress(OSError):  # the terminal is gone
            self._progress.start_task(task)
            self._progress.update(task, completed=step.done, total=step.total)

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()


def in_terminal() -> bool:
    """Whether somebody sees bars."""
    return sys.stderr is not None and sys.stderr.isatty()
