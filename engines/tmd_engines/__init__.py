"""Bundles and engines: the exported graphs of a model, checked, and made executable on a device.

This package reads and writes the bundle format (`docs/bundle.md`) and runs single graphs on preallocated buffers. It
knows nothing of prompts, samplers or video files (`tmd_runtime` does) and nothing of torch (`tmd_export` does), and it
downloads nothing.

    from tmd_engines import Bundle, load

    bundle = Bundle.open("my-bundle")              # every file is checked before this returns
    engine = load(bundle, "backbone", threads=4)
    step = engine.bind(inputs, outputs)            # preallocated arrays, bound once
    step()                                         # runs; nothing is allocated by us

Names are imported when first used, so that `import tmd_engines` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import BundleError, EngineError

if TYPE_CHECKING:
    from .bundle.manifest import SCHEMA_VERSION, Manifest, TensorSpec
    from .bundle.reader import Bundle
    from .bundle.writer import BundleWriter
    from .engine import Engine, Step
    from .registry import load

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "BundleError",
    "BundleWriter",
    "Engine",
    "EngineError",
    "Manifest",
    "Step",
    "TensorSpec",
    "load",
]

# ONNX Runtime 1.31 keeps a record of its use in the user's cache, to be sent, from its import on; unless this is set.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "Bundle": "bundle.reader",
    "BundleWriter": "bundle.writer",
    "Engine": "engine",
    "Step": "engine",
    "load": "registry",
    "Manifest": "bundle.manifest",
    "SCHEMA_VERSION": "bundle.manifest",
    "TensorSpec": "bundle.manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
