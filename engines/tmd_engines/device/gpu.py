"""Whether this machine has an NVIDIA GPU and what runs graphs on it. Looks at files and packages, and loads nothing."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec


def split_device(device: str) -> tuple[str, int]:
    """Kind and number of a device: ("cuda", 1) of "cuda:1", ("cuda", 0) of "cuda". Any other name stays what it is."""
    match = re.fullmatch(r"cuda:([0-9]{1,3})", device) if isinstance(device, str) else None
    return ("cuda", int(match[1])) if match else (device, 0)


def has_gpu() -> bool:
    """A device of the kernel driver: desktop and server GPUs, or Jetson's."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvhost-gpu", "nvgpu/igpu0")):
        return True
    try:
        return any(re.match("nvidia[0-9]", name) for name in os.listdir("/dev"))
    except OSError:
        return False


def has_cuda_bindings() -> bool:
    try:
        return find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:  # there is no `cuda` at all
        return False


def has_onnxruntime_cuda() -> bool:
    """A GPU and ONNX Runtime in its build for it, which is a package of another name."""
    if not has_gpu():
        return False
    from importlib.metadata import PackageNotFoundError, distribution  # slow to import

    try:
        distribution("onnxruntime-gpu")
    except PackageNotFoundError:
        return False
    return find_spec("onnxruntime") is not None
