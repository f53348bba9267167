"""`tmd-run` as a process."""

from __future__ import annotations

import signal
import sys

PROGRAM = [sys.executable, "-m", "tmd_runtime"]


def with_default_signals() -> None:
    """For `preexec_fn`: a caller that ignores Ctrl-C, as a shell does for jobs in the background, hands that on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
