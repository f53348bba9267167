"""Entry point of `tmd-run`. Loads nothing before a Ctrl-C can end the process without a traceback."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` wraps; it takes no time to import

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)


def main() -> None:
    """Runs `tmd-run`, once its own handling of signals is in place."""
    from .cli import main as run

    run()
