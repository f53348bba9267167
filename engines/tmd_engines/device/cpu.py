"""What this machine's processor is and can do. Read from the system, without a library."""

from __future__ import annotations

import os
import platform
import sys
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .control_groups import control_groups, lines

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

SMALL_BYTES, SMALL_THREADS = 64 << 20, 2
"""Bundles of at most so many bytes run in so many threads where nobody says how many. What a graph computes depends on
the number of threads, and a small model shall make one video of one seed on every machine."""

# The CPU features that decide how fast an engine is: vectors, then int8 and bfloat16 products, then matrix units.
_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def describe_cpu() -> dict[str, Any]:
    """`name`, `cores` usable by this process, and those `features` that matter (None where they cannot be read)."""
    fields: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if colon:
                    fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass  # not Linux
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [feature for feature in _FEATURES if feature in flags] if flags else None,
    }


def cpu_key() -> dict[str, str]:
    """What a compiled graph depends on of the processor, for the key of a cache."""
    cpu = describe_cpu()
    return {
        "cpu": f"{sys.platform} {cpu['name']}, {cpu['cores']} cores",
        "features": " ".join(cpu["features"] or ()),
    }


def cores(root: Path = Path("/")) -> int:
    """Processors that this process may use: those of its affinity, or as many as its container's quota is worth."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return usable if quota is None else max(min(usable, ceil(quota)), 1)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups around this process leave it (version 2 and version 1).

    None: no limit. `root` is where /proc and /sys are.
    """
    groups = control_groups(root, "cpu", ("cpu", "cpu,cpuacct"))
    return min((quota for _, group in groups if (quota := _quota(group)) is not None), default=None)


def resolve_threads(bundle: Bundle, threads: int | None, root: Path = Path("/")) -> tuple[int | None, str | None]:
    """The threads of an engine for a wish (None: nobody said), and a note for people if it is not granted.

    None goes on as None, an engine's own choice, if the model is large and no quota limits the process.
    """
    if threads is None:
        if sum(file.size for file in bundle.manifest.files.values()) <= SMALL_BYTES:
            return SMALL_THREADS, None
        return (None if cpu_quota(root) is None else cores(root)), None
    most = max(os.cpu_count() or 1, SMALL_THREADS)
    if threads > most:
        return most, f"{threads} threads are more than this machine's {os.cpu_count()} processors: {most} are used."
    return threads, None


def _quota(group: Path) -> float | None:
    words = "".join(lines(group / "cpu.max")).split()
    if not words:
        words = ["".join(lines(group / f"cpu.cfs_{name}_us")).strip() for name in ("quota", "period")]
    if len(words) != 2 or not all(word.isdigit() for word in words) or 0 in map(int, words):
        return None  # "max", -1, or no such file
    return int(words[0]) / int(words[1])
