"""From a prompt to a video with an exported model: tokenizer, noise, few-step loop, decoding, file, and `tmd-run`.

Not here: torch (the reference is `tmd_ref`), the bundle format and the engines (`tmd_engines`), and any access to a
network.

    import tmd_runtime

    pipeline = tmd_runtime.load()
    result = pipeline("a red circle moving right on a black background", seed=1)
    tmd_runtime.write_video("circle.mp4", result.frames, result.fps)

Names are imported when first used, so that `import tmd_runtime` and `tmd-run --help` cost nothing.
"""

from __future__ import annotations

from .errors import Cancelled, RuntimeFailure, UsageFailure

TYPE_CHECKING = False  # as `typing` has it, without the milliseconds in which a Ctrl-C would end in a traceback
if TYPE_CHECKING:
    from typing import Any

    from .clock import StepInfo
    from .files.video import open_video, write_video
    from .pipeline import Pipeline, load
    from .result import Result
    from .sampling.noise import NoiseStream
    from .settings import Settings

__all__ = [
    "Cancelled",
    "NoiseStream",
    "Pipeline",
    "Result",
    "RuntimeFailure",
    "Settings",
    "StepInfo",
    "UsageFailure",
    "load",
    "open_video",
    "write_video",
]

_HOME = {
    "NoiseStream": "sampling.noise",
    "Pipeline": "pipeline",
    "Result": "result",
    "Settings": "settings",
    "StepInfo": "clock",
    "load": "pipeline",
    "open_video": "files.video",
    "write_video": "files.video",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
