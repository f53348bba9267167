"""Entry point of `tmd-bench`."""

from __future__ import annotations

from tmd_engines.command import quiet  # noqa: F401  # first


def main() -> None:
    """Runs `tmd-bench`."""
    from .cli import main as run

    run()
