"""What this machine has for running graphs: Python, CPU, engines, NVIDIA driver. Looks, and changes nothing."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import import_module
from typing import Any

from ..device.cpu import describe_cpu
from ..engine import Engine
from ..registry import ENGINES, engine_class


def examine() -> dict[str, Any]:
    """The findings as plain data: `python`, `platform`, `cpu`, `engines` by name, `nvidia` (None without a driver).

    Engines are really imported, because a package that is installed may still lack a library.
    """
    nvidia = _nvidia()
    classes = {name: engine_class(name, next(iter(ENGINES[name]))) for name in sorted(ENGINES)}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": describe_cpu(),
        "engines": {name: _engine(found, nvidia) for name, found in classes.items()},
        "nvidia": nvidia,
    }


def _engine(engine: type[Engine], nvidia: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("version", "problem", "install", "note"))
    try:
        found["version"] = str(getattr(import_module(engine.package), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        found["problem"] = "not installed" if error.name == engine.package else str(error)
        found["install"] = engine.install
    except Exception as error:  # a broken installation may raise anything, and the doctor must survive it
        found["problem"] = f"installed, but cannot be imported: {' '.join(str(error).split())[:300]}"
        found["install"] = engine.install
    else:
        found["note"] = engine.note() or engine.note_on(nvidia)
    return found


def _nvidia() -> dict[str, Any] | None:
    """`driver` version and `gpus`, from nvidia-smi; the kernel module's word where that program is missing."""
    program = shutil.which("nvidia-smi")
    if program:
        query = [program, "--query-gpu=driver_version,name,compute_cap", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            answer = ""
        rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") >= 2]
        if rows:
            gpus = [{"name": ", ".join(row[1:-1]), "compute_capability": row[-1]} for row in rows]
            return {"driver": rows[0][0], "gpus": gpus}
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8", errors="replace") as file:
            return {"driver": " ".join(file.readline().split()), "gpus": []}
    except OSError:
        return None
