"""What `tmd-engine build` prints: one line per graph, and on a terminal how far the build is."""

from __future__ import annotations

import re
import sys
from time import perf_counter
from typing import TYPE_CHECKING

import click

from .build import build

if TYPE_CHECKING:
    from ..bundle.reader import Bundle
    from ..engine import BuildStep


def print_build(
    bundle: Bundle, engine: str, device: str, size: tuple[int, int, int], threads: int | None = None
) -> None:
    """Builds and tells; raises as `build` does."""
    live = sys.stderr.isatty()
    width, height, frames = size
    click.echo(f"{frames} frames of {width}x{height}")

    def tell(step: BuildStep) -> None:
        if step.message is not None:
            click.echo(f"{step.graph}: {step.message}", err=True)
        elif live:
            left = "" if step.left is None else f", {_clock(step.left)} left"
            click.echo(
                f"\r{step.graph:<14} {step.fraction:4.0%} after {_clock(step.seconds)}{left}   ", err=True, nl=False
            )

    start = perf_counter()
    for graph, name, where in build(bundle, engine, device, size, threads, tell):
        if live:
            click.echo("\r", err=True, nl=False)
        click.echo(f"{graph:<14} {name} on {where:<5} {perf_counter() - start:8.1f} s")
        start = perf_counter()


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
