"""Entry point of `tmd-engine`."""

from __future__ import annotations

from . import quiet  # noqa: F401  # first


def main() -> None:
    """Runs `tmd-engine`."""
    from .cli import main as command
    from .program import run_program

    run_program(command, "tmd-engine")
