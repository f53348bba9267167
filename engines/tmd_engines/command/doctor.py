"""What this machine has for running graphs: Python, CPU, engines, NVIDIA driver. Looks, and changes nothing."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import import_module
from typing import Any

from ..device.cpu import describe_cpu
from ..device.gpu import has_cuda_bindings, has_gpu, has_onnxruntime_cuda
from ..device.plan_cache import cache_folder, distrust

# engine -> (module to import, what to install)
_PACKAGES = {
    "onnxruntime": ("onnxruntime", "pip install onnxruntime"),
    "openvino": ("openvino", "pip install openvino"),
    "tensorrt": ("tensorrt", "pip install tensorrt cuda-python (needs an NVIDIA GPU and driver)"),
}
_WITHOUT = "pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


def examine() -> dict[str, Any]:
    """The findings as plain data: `python`, `platform`, `cpu`, `engines` by name, `nvidia` (None without a driver).

    Engines are really imported, because a package that is installed may still lack a library.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": describe_cpu(),
        "engines": {name: _engine(name, *package) for name, package in _PACKAGES.items()},
        "nvidia": _nvidia(),
    }


def _engine(name: str, module: str, install: str) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(("version", "problem", "install", "note"))
    try:
        found["version"] = str(getattr(import_module(module), "__version__", "unknown"))
    except ModuleNotFoundError as error:
        found["problem"] = "not installed" if error.name == module else str(error)
        found["install"] = install
    except Exception as error:  # a broken installation may raise anything, and the doctor must survive it
        found["problem"] = f"installed, but cannot be imported: {' '.join(str(error).split())[:300]}"
        found["install"] = install
    else:
        notes = {"openvino": _openvino_note, "onnxruntime": _onnxruntime_note, "tensorrt": _tensorrt_note}
        found["note"] = notes[name]()
    return found


def _onnxruntime_note() -> str | None:
    """Whether it has the GPU, where there is one."""
    if not has_gpu():
        return None
    return "on the CPU and the GPU" if has_onnxruntime_cuda() else f"on the CPU only, for the GPU: {_WITHOUT}"


def _tensorrt_note() -> str | None:
    """What it lacks to run here, and the command that mends it."""
    if not has_gpu():
        return "but no NVIDIA GPU is seen: install its driver"
    return None if has_cuda_bindings() else "but not the CUDA bindings for Python: pip install cuda-python"


def _openvino_note() -> str:
    """How this CPU computes bf16 graphs, and where compiled graphs are kept."""
    features = describe_cpu()["features"] or ()
    units = [feature for feature in ("amx_bf16", "avx512_bf16") if feature in features]
    folder = cache_folder()
    kept = "off" if folder is None else (folder.exists() and distrust(folder)) or str(folder)
    return f"bf16 graphs in {f'bfloat16 ({units[0]})' if units else 'float32'}, compiled graphs kept: {kept}"


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
