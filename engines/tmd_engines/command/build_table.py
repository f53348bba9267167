"""What `tmd-engine build` prints: one line per graph, and on a terminal how far the build is."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import click

from ..bundle.reader import format_size
from ..tensorrt.targets import parse_targets
from .build import build
from .device_memory import device_memory
from .plan_folder import build_plans

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..engine import BuildStep
    from .sizes import Sizes


def print_build(bundle: Bundle, engine: str, device: str, sizes: Sizes, threads: int | None = None) -> None:
    """Builds and tells; raises as `build` does."""
    click.echo(str(sizes))
    start = perf_counter()
    for graph, name, where in build(bundle, engine, device, sizes, threads, _teller()):
        _clear()
        click.echo(f"{graph:<14} {name} on {where:<5} {perf_counter() - start:8.1f} s")
        start = perf_counter()


def print_plans(bundle: Bundle, engine: str, sizes: Sizes, targets: str, out: str) -> None:
    """Builds plans for other machines and tells; raises as `build_plans` does."""
    wanted = parse_targets(targets)
    names = "every RTX card from compute capability 8.0 on" if not wanted else f"compute capability {', '.join(wanted)}"
    click.echo(f"{sizes}, for {names}")
    figures: dict[str, dict[str, int]] = {}
    for made in build_plans(bundle, engine, sizes, wanted, Path(out), _teller()):
        _clear()
        if made.entry is None:
            click.echo(f"{made.graph:<14} left out: {made.skipped}")
            continue
        known = figures.setdefault(made.graph, {})
        for name, value in made.entry.figures.items():
            known[name] = max(known.get(name, 0), value)
        shown = ", ".join(
            f"{name} {format_size(made.entry.figures[name])}"
            for name in ("weights", "scratch")
            if name in made.entry.figures
        )
        click.echo(f"{made.graph:<14} {format_size(made.entry.size):>9} {made.seconds:8.1f} s   {shown}")
    needed = device_memory(bundle, sizes.largest, figures)
    for line in needed.lines():
        click.echo(f"on the GPU     {line}")
    click.echo(f"{out} is complete: tmd-run --bundle {bundle.folder} --engine {engine} --plans {out} ...")


def _teller() -> Callable[[BuildStep], None]:
    live = sys.stderr.isatty()

    def tell(step: BuildStep) -> None:
        if step.message is not None:
            click.echo(f"{step.graph}: {step.message}", err=True)
        elif live:
            left = "" if step.left is None else f", {_clock(step.left)} left"
            click.echo(
                f"\r{step.graph:<14} {step.fraction:4.0%} after {_clock(step.seconds)}{left}   ", err=True, nl=False
            )

    return tell


def _clear() -> None:
    if sys.stderr.isatty():
        click.echo("\r", err=True, nl=False)


def tensorrt_version_of(text: str | None) -> tuple[int, int]:
    """A version as people write it, or that of the library here. Raises EngineError, and ValueError for a bad text."""
    if text is None:
        from ..tensorrt.library import TENSORRT, use

        use(TENSORRT)
        return TENSORRT.operators()
    match = re.fullmatch(r"(1[01])\.([0-9]{1,2})(\.[0-9.]*)?", text)
    if not match:
        raise ValueError(f"{text!r} is no version of TensorRT 10 or 11: write it as 10.3.")
    return int(match[1]), int(match[2])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
