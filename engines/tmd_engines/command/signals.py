"""How a program ends when it is told to: Ctrl-C, SIGTERM and SIGHUP, whatever it is doing.

A signal stops a running graph and raises KeyboardInterrupt (or SystemExit), so that the program unwinds. If that takes
longer than `PATIENCE_SECONDS`, or at a second signal, the process removes what it was making and ends on the spot.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from .. import unfinished
from ..device.running import AGAIN_SECONDS, stop_step

PATIENCE_SECONDS = 0.25
_SHOW_CURSOR = b"\x1b[?25h"


class Ending:
    """The watch of a program over its signals; made once, in the main thread.

    `last_words` are what is said where the program cannot say anything itself any more. With `patient` set, a first
    signal may take as long as it takes: a second one is what ends the process.
    """

    def __init__(self, last_words: Callable[[], object] | None = None) -> None:
        self.last_words, self.patient = last_words, False
        self._number: int | None = None
        self._since = 0.0
        self._thread = threading.get_ident()
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # Ignored by whoever started the program (nohup, a job in the background): it stays so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _raise)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    @property
    def code(self) -> int | None:
        """The exit code of a program that a signal is ending; None: there was no signal."""
        return None if self._number is None else 128 + self._number

    def calm(self) -> None:
        """The work that a signal should end has ended, and the program goes on."""
        self._number = None

    def over(self) -> None:
        """Nothing is left to clean up: from now on a signal ends the process as it does by default.

        If a signal is what ended the work, the process ends here.
        """
        self.last_words = None
        if self._number is not None:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            self._end(self._number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)

    def _watch(self) -> None:
        while True:
            waits = None if self._number is None else AGAIN_SECONDS
            if select.select([self._reader], [], [], waits)[0]:
                for number in os.read(self._reader, 256):
                    if number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                        self._note(number)
            if self._number is not None:
                stop_step(self._thread)
                if not self.patient and time.monotonic() - self._since > PATIENCE_SECONDS:
                    self._end(self._number)

    def _note(self, number: int) -> None:
        if self._number is not None:
            self._end(number)
        self._number, self._since = number, time.monotonic()

    def _end(self, number: int) -> None:
        unfinished.remove_all()
        with suppress(BaseException):  # SystemExit too: it would end this thread alone
            if os.isatty(2):
                os.write(2, _SHOW_CURSOR)
            if self.last_words is not None:
                self.last_words()
        os._exit(128 + number)


def _raise(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)
