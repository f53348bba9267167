"""Reading the files of an untrusted folder: one open per file, and everything asked of that one descriptor.

A name is looked up once (without following a link); kind, size and content then come from the open descriptor, so that
nothing can be exchanged between the check and the reading.
"""

from __future__ import annotations

import hashlib
import os
import stat
from io import FileIO
from pathlib import Path

from ..errors import BundleError

_CHUNK = 1 << 20

# O_NONBLOCK: opening a pipe must not wait for a writer (it has no effect on regular files). Windows lacks both flags.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(folder: Path, name: str) -> FileIO:
    """Opens `folder/name` for reading if it is a regular file and not a link. Raises BundleError.

    Hard links are allowed: package installers (uv) link package data from a cache, and a second name can be no way out
    of the folder when the content must have the sha256 that the manifest states.
    """
    path = folder / name
    try:
        if stat.S_ISLNK(path.lstat().st_mode):
            raise BundleError(
                f"{path} is a symbolic link, which could lead out of the bundle: put the file itself there."
            )
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        raise BundleError(
            f"{path} is missing: the bundle is incomplete. Copy the bundle again, or make it again with tmd-export."
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be opened: {_reason(error)}. Check the path and its permissions.") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleError(f"{path} is not a regular file: put the file itself there, or make the bundle again.")
    return FileIO(descriptor)


def file_size(file: FileIO) -> int:
    """Size in bytes of an open file."""
    return os.fstat(file.fileno()).st_size


def read_up_to(file: FileIO, limit: int) -> bytes:
    """The bytes from the current position on, `limit` at most, whatever size the file claims."""
    parts = []
    while limit > 0 and (part := file.read(min(limit, _CHUNK))):
        parts.append(part)
        limit -= len(part)
    return b"".join(parts)


def sha256_hex(file: FileIO) -> str:
    """sha256 of the content from the current position on, in lower-case hex, through one 1 MiB buffer."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        digest.update(view[:count])
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()
