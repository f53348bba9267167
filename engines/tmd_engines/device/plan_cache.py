"""Compiled graphs kept between runs, in a folder that only the user can write.

An entry is found by a key, a flat dict that names everything the compiled graph depends on. It is one file: a line of
JSON (the key, the length and sha256 of what follows), then the engine's own bytes. What does not fit its line, or the
key, is no entry: the engine compiles anew and writes over it. `TMD_CACHE` names another folder, or is `off`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from .. import unfinished
from ..bundle.files import file_size, open_regular, read_up_to
from ..cache_folder import distrust
from ..errors import BundleError, quote

MAX_ENTRY_BYTES = 256 << 20  # engines keep graphs of up to 64 MiB, which grow when they are compiled
MAX_FOLDER_BYTES = 1 << 30
_MAX_LINE = 1 << 16
_NEW = ".new-"

Key = Mapping[str, str]


class PlanCache:
    """The entries of one folder. Every failure of the disk is a miss: a cache may make nothing worse."""

    def __init__(self, folder: Path | None, max_entry: int | None = None, max_folder: int | None = None) -> None:
        """`folder` is made if it is not there; None, or a folder that others can write, is a cache without entries.

        `max_entry` and `max_folder` are bytes, of the largest entry and of all together, if not the usual ones.
        """
        self._max_entry, self._max_folder = max_entry or MAX_ENTRY_BYTES, max_folder or MAX_FOLDER_BYTES
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = None if folder is None or distrust(folder) else folder

    @property
    def usable(self) -> bool:
        return self._folder is not None

    def load(self, key: Key) -> bytes | None:
        """The bytes stored under `key`, whole and unchanged, or None."""
        if self._folder is None:
            return None
        try:
            with open_regular(self._folder, _file_name(key)) as file:
                if file_size(file) > self._max_entry + _MAX_LINE:
                    return None
                line, newline, content = read_up_to(file, self._max_entry + _MAX_LINE).partition(b"\n")
        except (BundleError, OSError):
            return None
        return content if newline and line == _line(key, content) else None

    def map(self, key: Key) -> memoryview | None:
        """As `load`, without reading it into memory: pages of the file, for as long as the answer is kept."""
        if self._folder is None:
            return None
        try:
            with open_regular(self._folder, _file_name(key)) as file:
                if file_size(file) > self._max_entry + _MAX_LINE:
                    return None
                line = file.readline(_MAX_LINE)
                content = map_file(file)[len(line) :]
        except (BundleError, OSError, ValueError):
            return None
        return content if line == _line(key, content) + b"\n" else None

    def store(self, key: Key, content: bytes) -> None:
        """Keeps `content` under `key`: complete under its name or not at all. Old entries make room."""
        if len(content) <= self._max_entry:
            self._store(key, content, lambda file: file.write(content))

    def store_file(self, key: Key, source: BinaryIO) -> None:
        """As `store`, of a file's content, which is copied and never held."""
        content = map_file(source)
        if not 0 < len(content) <= self._max_entry:
            return

        def copy(file: BinaryIO) -> None:
            source.seek(0)
            shutil.copyfileobj(source, file, 1 << 20)

        self._store(key, content, copy)

    def _store(self, key: Key, content: bytes | memoryview, write: Callable[[BinaryIO], object]) -> None:
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            unfinished.sweep(self._folder, _NEW)
            _make_room(self._folder, self._max_folder - len(content))  # while it is made, both are there
            new = unfinished.begin(self._folder, prefix=_NEW, mode=0o600)
            try:
                with open(new, "wb") as file:
                    file.write(_line(key, content) + b"\n")
                    write(file)
                os.replace(new, self._folder / _file_name(key))
            finally:
                unfinished.discard(new)
            _make_room(self._folder, self._max_folder)

    def known(self) -> Iterator[dict[str, str]]:
        """What the entries state as their keys; whether they are whole is seen when they are loaded."""
        for path in sorted(self._folder.glob("*.plan")) if self._folder is not None else ():
            found = _key_of(path)
            if found is not None:
                yield found

    @contextlib.contextmanager
    def work_file(self) -> Iterator[BinaryIO]:
        """A file without a name to write a large entry to, on the disk of the cache if there is one."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            yield file

    def differences(self, key: Key, alike: tuple[str, ...]) -> list[str]:
        """What keeps the nearest entry that is equal in the fields `alike` from being the one for `key`.

        One text per field, `engine: tensorrt 10.3.0 there, tensorrt 10.16.1 here`; none if there is no such entry.
        """
        nearest: list[str] | None = None
        for found in self.known():
            if any(found.get(name) != key.get(name) for name in alike):
                continue
            found_differences = differences(found, key)
            if found_differences and (nearest is None or len(found_differences) < len(nearest)):
                nearest = found_differences
        return nearest or []

    @contextlib.contextmanager
    def locked(self, key: Key) -> Iterator[None]:
        """Around the making of an entry: another process that wants the same one waits, and finds it then."""
        if self._folder is None:
            yield
            return
        try:
            import fcntl

            lock = os.open(self._folder / f".{_file_name(key)}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except (ImportError, OSError):  # not Unix, or a disk without room: two may make it then, and one wins
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)  # and with it the lock; the empty file stays, because another may be waiting for it


def differences(there: Key, here: Key) -> list[str]:
    """One text per field in which two keys differ, for people."""
    return [
        f"{quote(name)[1:-1]}: {quote(there.get(name, 'nothing'))[1:-1]} there, "
        f"{quote(here.get(name, 'nothing'))[1:-1]} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]


def map_file(file: BinaryIO | FileIO) -> memoryview:
    """The content of an open file, without reading it. It stays valid when the file is closed. Raises OSError, and
    ValueError for an empty one."""
    file.flush()
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _line(key: Key, content: bytes | memoryview) -> bytes:
    document = {"key": dict(key), "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return json.dumps(document, sort_keys=True).encode()


def _key_of(path: Path) -> dict[str, str] | None:
    """The key that an entry states, without a look at its content."""
    try:
        with open_regular(path.parent, path.name) as file:
            line = read_up_to(file, _MAX_LINE).partition(b"\n")[0]
        key = json.loads(line)["key"]
    except (BundleError, OSError, ValueError, LookupError, TypeError):
        return None
    return {str(name): str(value) for name, value in key.items()} if isinstance(key, dict) else None


def _file_name(key: Key) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest() + ".plan"


def _make_room(folder: Path, limit: int) -> None:
    entries = sorted(_sizes(folder, "*.plan"))
    making = _sizes(folder, f"{_NEW}*{unfinished.SUFFIX}")  # of other processes
    excess = sum(size for _, size, _ in entries) + sum(size for _, size, _ in making) - limit
    for _, size, path in entries:
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
            excess -= size


def _sizes(folder: Path, pattern: str) -> list[tuple[int, int, Path]]:
    """When it was changed, bytes and path of each file, without those that another process removes meanwhile."""
    found = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    return found
