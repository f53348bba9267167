"""The control groups around this process, which limit its memory and its processors in a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def control_groups(root: Path, controller: str, mounts: tuple[str, ...]) -> Iterator[tuple[int, Path]]:
    """Version (2 or 1) and folder of every group, from this process's own up to the root.

    `root` is where /proc and /sys are; `mounts` are the names that version 1 has for those of `controller`.
    """
    for line in lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if controllers == "" else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        # Inside a container the path may be the host's, which is not there; the limit then stands at the mount itself.
        parts = Path(path.lstrip("/")).parts
        for name in mounts if version == 1 else ("",):
            for depth in range(len(parts), -1, -1):
                yield version, (root / "sys/fs/cgroup" / name).joinpath(*parts[:depth])


def lines(path: Path) -> list[str]:
    """Of a file of the system; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
