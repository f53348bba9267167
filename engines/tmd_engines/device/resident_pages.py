"""Pages of a mapped file that this process holds and need not.

An engine that maps the weights of a graph, and packs them into memory of its own, leaves every page that it has read
resident: at its peak the weights are there twice. `dropping` takes the pages from this process while the engine packs.
They stay in the kernel's cache of files, so reading one again costs a page fault and not the disk.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

PERIOD = 0.02  # seconds; an engine packs some 10 MB meanwhile

Range = tuple[int, int]
"""Address and length in bytes, both multiples of a page."""


def mapped_ranges(path: Path) -> tuple[Range, ...]:
    """Where this process has mapped the file that it opened as `path`, for reading alone; nothing but on Linux.

    The name may be gone by now. It has to be one that nobody else in this process opens: what is found belongs to the
    caller's mapping, and is good for as long as that is.
    """
    if sys.platform != "linux":
        return ()
    # The kernel escapes nothing but newlines. What it adds when the name is gone is a part of the line.
    names = {str(path).replace("\n", "\\012") + end for end in ("", " (deleted)")}
    found = []
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:  # /proc is not there: the pages stay
        return ()
    for line in maps.split("\n"):
        fields = line.split(maxsplit=5)  # addresses, rights, offset, device, inode, name
        if len(fields) == 6 and fields[5] in names and "w" not in fields[1]:
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((start, end - start))
    return tuple(found)


def drop(ranges: tuple[Range, ...]) -> None:
    """Takes the pages of these ranges from this process. Whoever reads them again gets the same bytes.

    The ranges must still be those of a mapping that nothing has written to.
    """
    if ranges:
        madvise = ctypes.CDLL(None).madvise
        for address, length in ranges:
            madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(mmap.MADV_DONTNEED))


@contextmanager
def dropping(ranges: tuple[Range, ...]) -> Iterator[None]:
    """Drops the pages of `ranges` every `PERIOD` while the block runs, which must not hold the interpreter's lock, and
    when it ends. The mapping has to outlive the block."""
    if not ranges:
        yield
        return
    over = Event()

    def watch() -> None:
        while not over.wait(PERIOD):
            drop(ranges)

    watcher = Thread(target=watch, name="tmd-resident-pages", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        drop(ranges)
