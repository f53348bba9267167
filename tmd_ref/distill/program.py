"""How `tmd-distill` begins and ends. This part imports no other, so it has a door of its own, and a plainer one than
the other commands: Python is back between any two operations of torch, and there is no graph to stop.

Ctrl-C, SIGTERM and SIGHUP unwind the program. If that takes longer than `PATIENCE_SECONDS`, or at a second signal, the
process removes what it was making, and ends.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from tmd_ref import partial

PATIENCE_SECONDS = 0.25
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal told the program to end. `code` is its exit code then."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number


def run_program(command: Callable[[], object]) -> NoReturn:
    """Runs `command`, which ends by SystemExit, as the program."""
    _repair_streams()
    seen: list[int] = []  # by the thread that watches
    raised: list[int] = []  # by the handler
    code: object = 0
    try:
        reader = _watched(raised)
        threading.Thread(target=_watch, args=(reader, seen), name="signals", daemon=True).start()
        command()
    except Stopped as stop:  # before the command could say where to go on
        code = stop.code
    except SystemExit as end:
        code = end.code
    except OSError as error:  # a file; or --help and the report, where nobody reads
        code = 1
        where = "" if error.filename is None else f"{str(error.filename)[:200]}: "
        with suppress(OSError):
            os.write(2, f"tmd-distill: {where}{(error.strerror or str(error)).lower()}.\n".encode(errors="replace"))
    _flush()
    if raised or seen:  # nobody waits for torch to give its memory back
        os._exit(128 + (raised or seen)[0])
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(code)  # type: ignore[arg-type]


def _watched(raised: list[int]) -> int:
    """Puts the handling of signals in place; returns a descriptor that gives their numbers."""

    def stop(number: int, _: FrameType | None) -> None:
        raised.append(number)
        raise Stopped(number)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, stop)
    return reader


def _watch(reader: int, seen: list[int]) -> None:
    while True:
        if not select.select([reader], [], [], PATIENCE_SECONDS if seen else None)[0]:
            _end(seen[0])
        for number in os.read(reader, 256):
            if number in SIGNALS:
                if seen:
                    _end(number)
                seen.append(number)


def _end(number: int) -> None:
    partial.remove_all()
    with suppress(OSError):
        os.write(2, b"tmd-distill: stopped.\n")
    os._exit(128 + number)


def _flush() -> None:
    """What cannot be written by now goes nowhere, instead of failing again in Python's shutdown."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _repair_streams() -> None:
    """Closed streams get a place, or the next file would be opened under their number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
