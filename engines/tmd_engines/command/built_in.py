"""Bundles as commands name them: a folder, or `builtin:NAME` where the runtime is installed beside the engines."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ..bundle.reader import Bundle
from ..errors import BundleError, quote

_PREFIX = "builtin:"


def open_bundle(name: str) -> Bundle:
    """The bundle of a command line. Raises BundleError."""
    if not name.startswith(_PREFIX):
        return Bundle.open(name)
    found = find_spec("tmd_runtime")
    folder = Path(found.origin).parent / "bundles" if found is not None and found.origin else None
    here = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder and folder.is_dir() else []
    wanted = name.removeprefix(_PREFIX)
    if folder is None or wanted not in here:
        choice = f"choose one of {', '.join(here)}" if here else "this installation has none"
        raise BundleError(f"There is no built-in bundle {quote(wanted)}: {choice}.")
    return Bundle.open(folder / wanted)
