"""What a run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing import Self

    from tmd_engines.cost.sizing import Memory

    from .settings import Settings


@dataclass(frozen=True)
class Result:
    """What a run gave: `frames` uint8 `[F, H, W, 3]` (RGB), how they came about, and the seconds per stage.

    `stage_seconds` has the stages `load` (0 when warm), `text`, `noise`, `backbone`, `flow_head`, `decode`, and
    `encode` if the run started from a picture. `times` are those of a model that steps between times, noise to data.
    `rho` is the strength of fresh noise in its steps. `latents` are what was decoded; `memory` is the mode of the run,
    "all" or "low". `threads` are those of the engines on the CPU (None: their own choice), on which the last bits of
    what they compute depend. `warnings` are for people.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    fps: int
    prompt: str
    seed: int
    steps: int
    inner_steps: int
    nfe: float
    stage_seconds: dict[str, float]
    warnings: tuple[str, ...] = ()
    rule: str = "euler"
    guidance: float = 1.0
    memory: Memory = "all"
    times: tuple[float, ...] = ()
    latents: NDArray[np.float32] | None = field(default=None, repr=False)
    rho: float = 0.0
    threads: int | None = None

    @classmethod
    def of(cls, settings: Settings, frames: NDArray[np.uint8], **more: Any) -> Self:
        """What a run with these settings gave; `more` are the fields that settings do not say."""
        same = ("fps", "seed", "steps", "inner_steps", "nfe", "rule", "guidance", "times", "rho")
        return cls(frames=frames, **{name: getattr(settings, name) for name in same}, **more)

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])
