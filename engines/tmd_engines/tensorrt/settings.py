"""What a build depends on beside the graph, its sizes and the device. Plain data, known without a library."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..errors import EngineError, quote

WORKSPACE = "TMD_TENSORRT_WORKSPACE"  # MiB; read whenever a plan is looked for, because it is part of its key


@dataclass(frozen=True)
class BuildSettings:
    """`workspace` in bytes, None: no limit. `targets` are compute capabilities; none: this GPU, or every RTX card."""

    workspace: int | None = None
    weight_streaming: bool = False
    targets: tuple[str, ...] = ()

    def flags(self) -> str:
        """For the key of the plan: every setting but the targets, which have a field there, and what is always set."""
        return f"workspace {self.workspace}, weight streaming {self.weight_streaming}, no TF32"


def workspace_limit() -> int | None:
    """Bytes that TensorRT may use beside weights and buffers, from the environment; None: what there is."""
    wanted = os.environ.get(WORKSPACE, "")
    if not wanted:
        return None
    if not (wanted.isascii() and wanted.isdigit() and 0 < int(wanted) <= 1 << 24):
        raise EngineError(f"{WORKSPACE} is {quote(wanted)}: give a whole number of MiB, or unset it for no limit.")
    return int(wanted) << 20
