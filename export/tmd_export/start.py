"""Entry point of `tmd-export`."""

from __future__ import annotations

from tmd_engines.command import quiet  # noqa: F401  # first


def main() -> None:
    """Runs `tmd-export`."""
    from .cli import main as run

    run()
