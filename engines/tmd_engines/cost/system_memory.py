"""How much memory this process may still take, by what the kernel and the container say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..device.control_groups import control_groups, lines


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that this process can take without swapping, in bytes; None where the system does not tell (not Linux).

    The least of what the machine has (MemAvailable), what the control groups around this process leave it, and what is
    left of its address space (RLIMIT_AS); pages of files that the kernel can drop count as free. `root` is where /proc
    and /sys are.
    """
    found = [size for size in (_machine(root), *_control_groups(root), _address_space(root)) if size is not None]
    return max(min(found), 0) if found else None


def resident_bytes(root: Path = Path("/")) -> int:
    """What this process holds of the memory already; 0 where the system does not tell."""
    return _status(root, "VmRSS") or 0


def _address_space(root: Path) -> int | None:
    """What `ulimit -v` leaves, which counts addresses and not memory; None: no limit."""
    for line in lines(root / "proc/self/limits"):
        if line.startswith("Max address space"):
            limit = line.removeprefix("Max address space").split()[0]
            used = _status(root, "VmSize")
            return int(limit) - used if limit.isdigit() and used is not None else None
    return None


def _status(root: Path, name: str) -> int | None:
    for line in lines(root / "proc/self/status"):
        field, _, value = line.partition(":")
        if field == name:
            return int(value.split()[0]) * 1024
    return None


def _machine(root: Path) -> int | None:
    for line in lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _control_groups(root: Path) -> Iterator[int]:
    """What each memory limit leaves, from this process's own group up to the root (version 2 and version 1)."""
    files = {
        2: ("memory.max", "memory.current", "inactive_file"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    for version, group in control_groups(root, "memory", ("memory",)):
        left = _left(group, *files[version])
        if left is not None:
            yield left


def _left(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    limit, usage = ("".join(lines(group / name)) for name in (limit_name, usage_name))
    if not limit.isdigit() or not usage.isdigit():  # "max": no limit
        return None
    statistics = dict(line.split(maxsplit=1) for line in lines(group / "memory.stat") if " " in line)
    return int(limit) - int(usage) + int(statistics.get(cache_name, "0"))
