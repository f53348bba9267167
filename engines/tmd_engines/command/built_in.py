"""Bundles as commands name them: a folder, or `builtin:NAME` where the runtime is installed beside the engines."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

PREFIX = "builtin:"


def open_bundle(name: str) -> Bundle:
    """The bundle of a command line. Raises BundleError."""
    from ..bundle.reader import Bundle
    from ..errors import BundleError, quote

    if not name.startswith(PREFIX):
        return Bundle.open(name)
    here = built_in_bundles()
    wanted = name.removeprefix(PREFIX)
    if wanted not in here:
        choice = f"choose one of {', '.join(here)}" if here else "this installation has none"
        raise BundleError(f"There is no built-in bundle {quote(wanted)}: {choice}.")
    return Bundle.open(here[wanted])


def built_in_bundles() -> dict[str, Path]:
    """Name -> folder of each built-in bundle; none where the runtime is not installed."""
    found = find_spec("tmd_runtime")
    folder = Path(found.origin).parent / "bundles" if found is not None and found.origin else None
    if folder is None or not folder.is_dir():
        return {}
    return {path.name: path for path in sorted(folder.iterdir()) if path.is_dir()}
