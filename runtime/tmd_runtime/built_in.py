"""The bundles that come with the package: `builtin:NAME` wherever a bundle is named, and `tiny` where none is."""

from __future__ import annotations

from pathlib import Path

from .errors import RuntimeFailure, UsageFailure

BUNDLES = Path(__file__).parent / "bundles"
BUILT_IN = BUNDLES / "tiny"
PREFIX = "builtin:"


def locate(bundle: str | Path | None) -> Path:
    """Folder of a bundle: its path, `builtin:NAME`, or None for the built-in model of videos.

    Raises UsageFailure for a name that is not among the built-in ones, RuntimeFailure if this installation has none.
    """
    if not isinstance(bundle, str | Path | None):
        raise UsageFailure(f"a bundle is a folder or builtin:NAME, not a {type(bundle).__name__}.")
    name = "tiny" if bundle is None else str(bundle).removeprefix(PREFIX)
    if bundle is not None and not str(bundle).startswith(PREFIX):
        return Path(bundle)
    here = sorted(folder.name for folder in BUNDLES.iterdir() if folder.is_dir()) if BUNDLES.is_dir() else []
    if not here:
        raise RuntimeFailure(
            "this installation has no built-in model. Install tmd again, or name a bundle (--bundle DIR)."
        )
    if name not in here:
        raise UsageFailure(f"there is no built-in bundle {name!r}: choose one of {', '.join(here)}.")
    return BUNDLES / name
