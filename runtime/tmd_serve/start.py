"""Entry point of `tmd-serve`. Loads nothing before a Ctrl-C can end the process without a traceback."""

from __future__ import annotations

from tmd_engines.command import quiet  # noqa: F401  # first


def main() -> None:
    """Runs `tmd-serve`, once its own handling of signals is in place."""
    from .command.cli import main as run

    run()
