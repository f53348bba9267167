"""The folders in which the hub's library keeps a repository: `models--ORG--NAME` with `refs`, `snapshots`, `blobs`."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import ExportError

_COMMIT = r"[0-9a-f]{40}"
_SNAPSHOT = re.compile(rf"models--((?:(?!--)[^/])+)--([^/]+)/snapshots/({_COMMIT})(/.+)?$")
_DEFAULT = "main"


def inside_cache(path: Path) -> Path:
    """The snapshot that the root of a cached repository stands for; any other path as it is.

    It is the one that the default branch was when it was downloaded, or the only one. Raises ExportError if that does
    not tell.
    """
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    snapshots = sorted(one for one in (path / "snapshots").iterdir() if one.is_dir())
    default = path / "refs" / _DEFAULT
    if default.is_file():
        commit = default.read_text(encoding="ascii", errors="replace").strip()
        chosen = [one for one in snapshots if one.name == commit]
        if not chosen:
            raise ExportError(
                f"{default} names a snapshot that is not there: the download is incomplete. Start it again."
            )
        return chosen[0]
    if len(snapshots) != 1:
        names = ", ".join(one.name for one in snapshots[:6]) or "none"
        raise ExportError(
            f"{path / 'snapshots'} has {len(snapshots)} snapshots ({names}), and nothing says which one is meant: give "
            "one of them as the --checkpoint."
        )
    return snapshots[0]


def in_snapshot(path: Path) -> bool:
    """Whether a file lies in a cached repository, of which a part may have been left out on purpose."""
    return _SNAPSHOT.search(path.absolute().as_posix()) is not None


def called(path: Path) -> str:
    """What a file or folder is called in a manifest: its name, or that on the hub with its commit if it lies in the
    cache of one."""
    real = path.absolute() if path.is_file() else path.resolve()  # a file of the cache is a link to one without a name
    match = _SNAPSHOT.search(real.as_posix())
    return real.name if match is None else f"hf:{match[1]}/{match[2]}@{match[3]}{match[4] or ''}"
