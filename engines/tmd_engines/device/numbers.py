"""A decimal point for libraries that read numbers as the host's language writes them.

OpenVINO reads attributes from text while it compiles, with the C library's functions: under a decimal comma 0.5 becomes
0, and frames differ by a level without a word.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_LC_NUMERIC_MASK = 1 << 1  # of glibc and musl


@contextmanager
def decimal_point() -> Iterator[None]:
    """Inside, this thread reads and writes numbers with a point; the host's other threads keep their locale."""
    library, plain = _plain_numbers()
    if library is None:
        yield
        return
    before = library.uselocale(plain)
    try:
        yield
    finally:
        library.uselocale(before)


@cache
def _plain_numbers() -> tuple[Any, Any]:
    """The C library and its locale with a point; None where that is unknown."""
    if not sys.platform.startswith("linux"):
        return None, None
    try:
        library = ctypes.CDLL(None)
        library.newlocale.restype = library.uselocale.restype = ctypes.c_void_p
        library.newlocale.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p]
        library.uselocale.argtypes = [ctypes.c_void_p]
        plain = library.newlocale(_LC_NUMERIC_MASK, b"C", None)
    except (AttributeError, OSError):
        return None, None
    return (library, plain) if plain else (None, None)
