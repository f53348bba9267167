"""Files and folders that are being made, under names that their maker locks.

A lock ends with its process. So what a killed one left behind is told from what another is still writing, whatever
machine or container that is on, and it can be removed.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX, SUFFIX = ".tmd-", ".part"

_made: dict[Path, int | None] = {}  # of this process -> its lock; None: the file system has no locks
_ATTEMPTS = 100
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # of Linux, of Linux, of macOS


def begin(folder: Path, is_folder: bool = False, prefix: str = PREFIX, suffix: str = SUFFIX, mode: int = 0o777) -> Path:
    """A new, empty file or folder in `folder`, with the permissions that the user's umask leaves of `mode`.

    Raises OSError."""
    for _ in range(_ATTEMPTS):
        path = folder / f"{prefix}{secrets.token_hex(6)}{suffix}"
        _made[path] = None  # before it is there: whoever ends the process at once shall find it
        try:
            if is_folder:
                os.mkdir(path, mode)
            else:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode & 0o666))
        except FileExistsError:
            del _made[path]
            continue
        except OSError:
            del _made[path]
            raise
        lock = _lock(path)
        if lock is not None and not _is(path, lock):  # somebody removed it before it had its lock
            os.close(lock)
            del _made[path]
            continue
        _made[path] = lock
        return path
    raise FileExistsError(17, "no new name was free", str(folder))


def exchange(one: Path, other: Path) -> bool:
    """Exchanges two names in one step, whatever has them. False where the system, or this file system, cannot."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
    except (OSError, TypeError):
        return False
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        return not library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
    return hasattr(library, "renamex_np") and not library.renamex_np(*names, _RENAME_SWAP)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which has the name `path` when the block is over, and is gone if that failed. Raises OSError."""
    new = begin(path.parent)
    try:
        yield new
        os.replace(new, path)
    finally:
        discard(new)


def end(path: Path) -> None:
    """`path` has its final name by now, or is gone."""
    lock = _made.pop(path, None)
    if lock is not None:
        os.close(lock)


def discard(path: Path) -> None:
    """Removes what is left under `path`, and forgets it."""
    _remove(path)
    end(path)


def remove_all() -> None:
    """Removes everything that this process is making, for one that ends without unwinding."""
    for path in list(_made):
        _remove(path)


def sweep(folder: Path, prefix: str = PREFIX, suffix: str = SUFFIX) -> list[str]:
    """Removes what processes that are gone have left unfinished in `folder`; returns the names.

    What a living process has locked stays, and everything where the file system has no locks.
    """
    pattern = re.compile(f"{re.escape(prefix)}[A-Za-z0-9_-]+{re.escape(suffix)}")
    removed = []
    try:
        names = sorted(name for name in os.listdir(folder) if pattern.fullmatch(name))
    except OSError:
        return []
    for name in names:
        path = folder / name
        lock = None if path in _made else _lock(path)
        if lock is None:
            continue
        if _is(path, lock):
            _remove(path)
            if not os.path.lexists(path):
                removed.append(name)
        os.close(lock)
    return removed


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None: it is locked, or there are no locks."""
    try:
        import fcntl

        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except OSError:
        return False


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
