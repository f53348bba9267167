"""What this machine has for running graphs: Python, CPU, engines, NVIDIA driver. Looks, and changes nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import import_module
from typing import Any

from .engine import is_implemented

# engine -> (module to import, what to install)
_PACKAGES = {
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
    "openvino": ("openvino", "pip install openvino"),
    "tensorrt": ("tensorrt", "pip install tensorrt (needs an NVIDIA GPU and driver)"),
}

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


def examine() -> dict[str, Any]:
    """The findings as plain data: `python`, `platform`, `cpu`, `engines` by name, `nvidia` (None without a driver).

    Engines are really imported, because a package that is installed may still lack a library.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "engines": {name: _engine(name, *package) for name, package in _PACKAGES.items()},
        "nvidia": _nvidia(),
    }


def _engine(name: str, module: str, install: str) -> dict[str, Any]:
    found: dict[str, Any] = {"implemented": is_implemented(name), "version": None, "problem": None, "install": None}
    try:
        found["version"] = str(getattr(import_module(module), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        found["problem"] = "not installed" if error.name == module else str(error)
        found["install"] = install
    except Exception as error:  # a broken installation may raise anything, and the doctor must survive it
        found["problem"] = f"installed, but cannot be imported: {' '.join(str(error).split())[:300]}"
        found["install"] = install
    return found


def _cpu() -> dict[str, Any]:
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
