"""Files in the making, under a second name: a reader finds the old file or the whole new one, and nothing is left of
what failed or was interrupted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".partial"

_made: set[Path] = set()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block is over, and is gone if that failed. Raises OSError.

    The name follows from `path`: what a killed process left there is written over.
    """
    partial = path.with_name(path.name + SUFFIX)
    _made.add(partial)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        _remove(partial)
        _made.discard(partial)


def write_whole(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Writes one file, with `sync` down to the disk. Raises OSError."""
    with writing(path) as partial, open(partial, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def remove_all() -> None:
    """Removes what this process is making, for one that ends without unwinding."""
    for partial in list(_made):
        _remove(partial)


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
