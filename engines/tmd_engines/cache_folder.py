"""The folder in which commands keep what they would otherwise make again: whose it must be, and small files in it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from . import unfinished

VARIABLE = "TMD_CACHE"
_MAX_BYTES, _MAX_ENTRIES = 1 << 20, 200  # of a small file


def cache_folder() -> Path | None:
    """The folder that the environment asks for; None: switched off. Looks at nothing on the disk."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() == "off":
        return None
    if wanted:
        return Path(wanted)
    base = os.environ.get("XDG_CACHE_HOME", "")  # the specification: what is not absolute is ignored
    home = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    return home / "tmd"


def distrust(folder: Path) -> str | None:
    """Why a folder that is there cannot be used; None: it can. Who writes an entry decides what our process runs."""
    try:
        status = folder.stat()
    except OSError as error:
        return f"{folder} cannot be used: {error.strerror}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder"
    if hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        return f"{folder} can be written by others: chmod 700 it, or name another folder in {VARIABLE}"
    return None


@cache
def code_key(*files: Path) -> str | None:
    """Tells one version of these modules from another, for the key of what they make; None: they cannot be read."""
    try:
        return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
    except OSError:
        return None


class Facts:
    """A file of JSON values by name, of which the latest are kept. A file that is damaged holds none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self) -> dict[str, Any]:
        """All of them."""
        folder = _folder()
        found: Any = None
        if folder is not None:
            with suppress(OSError, ValueError, RecursionError), open(folder / self._name, "rb") as file:
                found = json.loads(file.read(_MAX_BYTES))
        return found if isinstance(found, dict) else {}

    def add(self, news: dict[str, Any]) -> None:
        """Keeps these as well. Where the disk fails, or there is no cache, nothing is kept."""
        folder = _folder()
        if folder is None:
            return
        known = {name: value for name, value in self.read().items() if name not in news} | news
        latest = dict(list(known.items())[-_MAX_ENTRIES:])
        with suppress(OSError), unfinished.replacing(folder / self._name) as path:
            path.write_text(json.dumps(latest), encoding="utf-8")


def _folder() -> Path | None:
    folder = cache_folder()
    if folder is None:
        return None
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return None if distrust(folder) else folder
