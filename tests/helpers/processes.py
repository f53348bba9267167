"""Commands as processes, and signals for them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PROGRAM = [sys.executable, "-m", "tmd_runtime"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
PATIENCE = 10.0
"""Seconds for what takes half of one on a machine that does nothing else."""


def with_default_signals() -> None:
    """For `preexec_fn`: a caller that ignores Ctrl-C, as a shell does for jobs in the background, hands that on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def started(command: list[str], folder: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a folder, with its output in pipes; at the end of the block nothing of it is left."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, preexec_fn=with_default_signals, **{**pipes, **options})
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def send(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Sends a signal to a process that is in the midst of work, and sees that it ends of it; returns what it said."""
    assert process.poll() is None
    begin = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < PATIENCE
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in output + errors
    return output + errors


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until it is true; fails if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    """Ids of the processes that one has started (Linux)."""
    text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    return [int(word) for word in text.split()]


def is_gone(process: int) -> bool:
    """Whether a process has ended, even if nobody has asked for its exit code yet (Linux)."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True
