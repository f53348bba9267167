"""A folder of plans made ahead of time: `manifest.json`, and one file per plan. `tmd-engine build --out` writes it.

    {"schema_version": 1, "made_by": "tmd-engine 0.1.0", "plans": [{"file": "backbone.plan", "size": ..., "sha256": ...,
     "key": {...as in the cache...}, "figures": {"weights": ..., "scratch": ...}}, ...]}

Plans are code. A folder is read only when the user names it, and its files must be what its manifest says, which
protects from damage and not from somebody who can write there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .. import unfinished
from ..bundle.files import file_size, open_regular, read_up_to
from ..bundle.strict_json import read_json
from ..device.plan_cache import differences, map_file
from ..errors import BundleError, EngineError, quote
from .targets import EVERY_RTX_CARD, parse_targets, runs_on

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
_MAX_MANIFEST, _MAX_BYTES = 1 << 20, 1 << 40
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CAPABILITY = "compute capability"


class Entry(NamedTuple):
    """One plan: its file, size in bytes and sha256, the key as in the cache, and the builder's figures in bytes."""

    file: str
    size: int
    sha256: str
    key: dict[str, str]
    figures: dict[str, int]


class PlanFolder:
    """The plans of a folder that the user named. Raises EngineError if it is not one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open_regular(self.path, MANIFEST) as file:
                document = read_json(read_up_to(file, _MAX_MANIFEST))
            if type(document) is not dict or "schema_version" not in document:
                raise ValueError("it has no schema_version")
            version = document["schema_version"]
            if type(version) is not int or version != SCHEMA_VERSION:
                raise EngineError(
                    f"{self.path / MANIFEST} has schema_version {quote(version)}, and this version "
                    f"of tmd reads {SCHEMA_VERSION}: build the plans again with tmd-engine build --out."
                )
            if type(document.get("plans")) is not list:
                raise ValueError("it has no list of plans")
            self.entries = tuple(_entry(each) for each in document["plans"])
        except (BundleError, OSError, ValueError) as error:
            raise EngineError(
                f"{self.path} is not a folder of plans ({quote(str(error), 200)[1:-1]}): make one with "
                "tmd-engine build BUNDLE --engine tensorrt-rtx --out PLANS."
            ) from None

    def differences(self, entry: Entry, here: Mapping[str, str], device: tuple[str, str]) -> list[str]:
        """What keeps a plan from being the one with the key `here` on this GPU (name, compute capability)."""
        stated = entry.key.get(_CAPABILITY, "")
        try:
            targets = EVERY_RTX_CARD if stated == "rtx" else parse_targets(stated)
            major, _, minor = device[1].partition(".")
            fits = runs_on(targets, (int(major), int(minor)))
        except (EngineError, ValueError):
            fits = stated == device[1]
        others = differences(
            {name: value for name, value in entry.key.items() if name != _CAPABILITY},
            {name: value for name, value in here.items() if name != _CAPABILITY},
        )
        return others if fits else [f"{_CAPABILITY}: {quote(stated)[1:-1]} there, {device[1]} here", *others]

    def read(self, entry: Entry) -> memoryview:
        """The plan, whole and unchanged. Raises EngineError."""
        try:
            with open_regular(self.path, entry.file) as file:
                size = file_size(file)
                content = map_file(file) if size else memoryview(b"")
        except (BundleError, OSError) as error:
            raise EngineError(f"The plan {self.path / entry.file} cannot be read: {error}") from None
        if size != entry.size:
            raise EngineError(
                f"The plan {self.path / entry.file} has {size} bytes, and the manifest says {entry.size}: the copy is "
                "incomplete. Copy the folder again."
            )
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise EngineError(
                f"The plan {self.path / entry.file} is not what its manifest says (sha256): copy the folder again."
            )
        return content


def _entry(document: Any) -> Entry:
    """One of "plans". Raises ValueError; the C++ library has the same rules (plan_folder.cpp)."""
    part = document.get if type(document) is dict else {}.get
    file, size, sha256, key = part("file"), part("size"), part("sha256"), part("key")
    figures = part("figures", {})
    if type(file) is not str or not _FILE_NAME.fullmatch(file) or file == MANIFEST:
        raise ValueError("an entry has no proper file")
    if type(sha256) is not str or not _SHA256.fullmatch(sha256):
        raise ValueError("an entry has no proper sha256")
    if type(size) is not int or not _is_bytes(size):
        raise ValueError("an entry has no proper size")
    if type(key) is not dict or not all(type(value) is str for value in key.values()):
        raise ValueError("an entry has no proper key")
    if type(figures) is not dict or not all(map(_is_bytes, figures.values())):
        raise ValueError("an entry has no proper figures")
    return Entry(file, size, sha256, key, figures)


def _is_bytes(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_BYTES


class PlanFolderWriter:
    """Makes a folder of plans. It appears under its name when it is complete, and not before.

    with PlanFolderWriter(path) as plans:
        plans.add("backbone.plan", build)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: list[Entry] = []
        if path.exists():
            raise EngineError(f"{path} exists already: name a new folder, or remove it first.")

    def __enter__(self) -> PlanFolderWriter:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._work = unfinished.begin(self._path.parent, is_folder=True)
        except OSError as error:
            raise EngineError(f"{self._path} cannot be made ({error.strerror}): name another folder.") from None
        return self

    def add(self, file: str, build: Callable[[BinaryIO], tuple[dict[str, str], dict[str, int]]]) -> Entry:
        """Has `build` write a plan, which returns its key and figures. Raises EngineError, and what `build` raises."""
        try:
            with open(self._work / file, "w+b") as out:
                key, figures = build(out)
                content = map_file(out)
                entry = Entry(file, len(content), hashlib.sha256(content).hexdigest(), key, figures)
        except OSError as error:
            raise EngineError(f"{self._path / file} cannot be written: {error.strerror}.") from None
        self._entries.append(entry)
        return entry

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                from importlib.metadata import version

                document = {
                    "schema_version": SCHEMA_VERSION,
                    "made_by": f"tmd-engine {version('tmd-runtime')}",
                    "plans": [entry._asdict() for entry in self._entries],
                }
                (self._work / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")
                os.rename(self._work, self._path)
        except OSError as failure:
            raise EngineError(f"{self._path} cannot be written: {failure.strerror}.") from None
        finally:
            unfinished.discard(self._work)
