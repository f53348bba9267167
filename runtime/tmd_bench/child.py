"""Processes that `tmd-bench` starts: they end when it is gone, however that came, whatever they are doing.

Its end of their stdin closes then, which a thread of theirs waits for.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from queue import SimpleQueue


def lines() -> Iterator[str]:
    """What comes on stdin, line by line. At its end the process ends on the spot."""
    queue: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        rest = b""
        # Not sys.stdin, whose lock a thread would hold when the interpreter ends.
        while piece := os.read(0, 1 << 16):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                queue.put(line.decode() + "\n")
        os._exit(1)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while True:
        yield queue.get()


def follow() -> None:
    """From now on, the end of stdin ends this process as SIGTERM does, so that it can clean up."""

    def wait() -> None:
        while os.read(0, 1 << 16):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="stdin", daemon=True).start()


def main() -> None:
    """`python -m tmd_bench.child MODULE ...`: that module's `main`, with the arguments that follow."""
    module = sys.argv.pop(1)
    follow()
    import_module(module).main()


if __name__ == "__main__":
    main()
