"""What `tmd-export` shows: its progress, and the table or the record of what it made."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .export import ExportResult, Progress

COUNTED_BYTES = 100_000_000  # a file from this size on is written long enough to tell how far it is


def reporter(quiet: bool) -> Callable[[Progress], None] | None:
    """Without a terminal: one line when a graph begins."""
    if quiet:
        return None

    shown = set()

    def show(progress: Progress) -> None:
        if progress.stage == "calibrate" and progress.stage not in shown:
            click.echo("calibrating: both graphs in fp32, over whole samplings", err=True)
        if progress.stage == "trace":
            click.echo(f"{progress.graph} ({progress.done + 1} of {progress.total})", err=True)
        shown.add(progress.stage)

    return show


class Line:
    """What a terminal shows during the work: the graph, its stage, how many graphs are over, the time."""

    LABELS = {  # noqa: RUF012
        "calibrate": "calibrating",
        "trace": "tracing",
        "write": "writing",
        "verify": "comparing with the reference",
    }

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task("", total=None)

    def show(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def __call__(self, progress: Progress) -> None:
        from tmd_engines.bundle.reader import format_size

        text = f"{progress.graph}: {self.LABELS[progress.stage]}"
        if progress.bytes_total >= COUNTED_BYTES:
            text += f", {format_size(progress.bytes_done)} of {format_size(progress.bytes_total)}"
        self._progress.update(self._task, description=text, total=progress.total, completed=progress.done)

    def __enter__(self) -> Line:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def print_table(result: ExportResult, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    from tmd_engines.bundle.reader import format_size

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("graph")
    table.add_column("precision")
    for title in ("nodes", "size", "max error", "cosine", "time"):
        table.add_column(title, justify="right")
    for graph in result.graphs:
        found = graph.accuracy
        error, cosine = (f"{found.max_abs_error:.1e}", f"{found.cosine:.7f}") if found else ("not measured", "")
        size, took = format_size(graph.bytes), f"{graph.seconds:.1f} s"
        table.add_row(graph.name, graph.precision, str(graph.nodes), size, error, cosine, took)
    Console(soft_wrap=True).print(table)
    frames = [graph for graph in result.graphs if graph.accuracy and graph.accuracy.levels_changed]
    for graph in frames:
        click.echo(f"{graph.name}: {graph.accuracy.entry()['reference'].partition('; ')[2]}")  # type: ignore[union-attr]
    total = sum(file.size for file in result.bundle.manifest.files.values())
    click.echo(f"{result.bundle.folder}: {format_size(total)}, {seconds:.1f} s")


def record(result: ExportResult, seconds: float) -> dict[str, Any]:
    graphs = {}
    for graph in result.graphs:
        found = graph.accuracy.entry() if graph.accuracy else None
        graphs[graph.name] = {
            "precision": graph.precision,
            "nodes": graph.nodes,
            "bytes": graph.bytes,
            "seconds": round(graph.seconds, 3),
            "accuracy": found,
        }
    total = sum(file.size for file in result.bundle.manifest.files.values())
    loras = [lora.model_dump() for lora in result.bundle.manifest.provenance.loras]
    size = {"bytes": total, "seconds": round(seconds, 3)}
    return {"out": str(result.bundle.folder), **size, "loras": loras, "graphs": graphs}
