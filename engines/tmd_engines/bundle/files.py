"""Reading the files of an untrusted folder: one open per file, and everything asked of that one descriptor.

A name is looked up once; kind, size and content then come from the open descriptor, so that nothing can be exchanged
between the check and the reading.
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
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


def open_regular(folder: Path, name: str, follow: bool = False) -> FileIO:
    """Opens `folder/name` for reading if it is a regular file. Raises BundleError.

    `follow`: it may be a link to one, for files whose content is compared with a sha256, or is checked as a whole. Then
    a link is no way out of the folder. Hard links are always allowed: package installers (uv) make them.
    """
    path = folder / name
    try:
        is_link = stat.S_ISLNK(path.lstat().st_mode)
        if is_link and not follow:
            raise BundleError(
                f"{path} is a symbolic link, which could lead out of the bundle: put the file itself there."
            )
        if stat.S_ISREG(path.stat().st_mode):  # before opening: a link may lead to a device, which opening may start
            descriptor = os.open(path, _FLAGS if is_link else _FLAGS | _NO_LINK)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return FileIO(descriptor)
            os.close(descriptor)
    except FileNotFoundError:
        if path.is_symlink():
            raise BundleError(
                f"{path} is a link to a file that is not there: the bundle is incomplete. Copy or download it again."
            ) from None
        raise BundleError(
            f"{path} is missing: the bundle is incomplete. Copy the bundle again, or make it again with tmd-export."
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be opened: {_reason(error)}. Check the path and its permissions.") from None
    what = "a link to something that is not a regular file" if is_link else "not a regular file"
    raise BundleError(f"{path} is {what}: put the file itself there, or make the bundle again.")


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
