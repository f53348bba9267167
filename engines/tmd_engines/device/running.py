"""Which step each thread is running, so that a signal can stop it while the engine is deep in a graph.

Python runs signal handlers between its own instructions, and a graph may be one instruction of ten minutes. The byte
that Python writes to a wakeup descriptor comes at once: a thread waits for it and stops the step.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

AGAIN_SECONDS = 0.05
"""A stop is repeated so often: the first one may have come just before the step began."""


class Stoppable(Protocol):
    """A step that another thread can stop; stopping one that is not running does nothing."""

    def stop(self) -> None: ...


RUNNING: dict[int, Stoppable] = {}
"""Thread -> the step that it is running. A step enters itself and takes itself out."""


def stop_step(thread: int) -> None:
    """Stops what a thread is running, if it runs a step that can be stopped. Its step raises EngineError."""
    step = RUNNING.get(thread)
    if step is not None:
        with suppress(Exception):  # closed meanwhile
            step.stop()


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C stops a running graph of the main thread, whose KeyboardInterrupt follows.

    Does nothing in other threads, and where somebody else handles Ctrl-C or has a wakeup descriptor already.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if before != -1:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
        yield
        return
    thread = threading.Thread(target=_watch, args=(reader, threading.get_ident()), name="ctrl-c", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)
        thread.join()
        os.close(reader)


def _watch(reader: int, thread: int) -> None:
    """Until the other end of the pipe is closed: after a SIGINT, stops the thread's step again and again."""
    stopping = False
    while True:
        if select.select([reader], [], [], AGAIN_SECONDS if stopping else None)[0]:
            data = os.read(reader, 256)
            if not data:
                return
            stopping = stopping or signal.SIGINT in data
        if stopping:
            stop_step(thread)
