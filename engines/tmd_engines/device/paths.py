"""Names of files for libraries that take UTF-8 only."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from ..utf8 import is_utf8


def utf8_name(path: str | Path) -> str:
    """A name of `path` in UTF-8: its own, or one by way of its folder's descriptor (Linux).

    The name itself must be UTF-8 below the folder; a path of a folder alone may be anything. Raises OSError.
    """
    name = os.fspath(path)
    if is_utf8(name):
        return name
    folder, last = os.path.split(os.path.abspath(name))
    if not is_utf8(last):
        return f"/proc/self/fd/{_descriptor(os.path.abspath(name))}"
    return f"/proc/self/fd/{_descriptor(folder)}/{last}"


@cache
def _descriptor(path: str) -> int:
    """Stays open: a library may open files below the folder at any time."""
    return os.open(path, os.O_RDONLY)
