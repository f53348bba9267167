"""Entry point of `tmd-distill`."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # first, and what `signal` wraps: it takes no time to import

# Until the program's own handling is in place a Ctrl-C ends the process without a traceback.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def main() -> None:
    """Runs `tmd-distill`."""
    from .cli import main as command
    from .program import run_program

    run_program(lambda: command.main(prog_name="tmd-distill"))
