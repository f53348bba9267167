"""The work of a contender: plain data, sent to its process as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

RIVALS = ("torch", "torch-compile", "diffusers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Work:
    """One denoising job and where its weights come from.

    `model`, `checkpoint` and `random_seed` as in `tmd_export.open_source`, None where only a bundle is given; `kind` is
    the family of random weights. Width and height are in pixels. `blocks`: transformer blocks of a shortened model with
    random weights.
    """

    bundle: str
    precision: str
    width: int
    height: int
    frames: int
    steps: int
    inner_steps: int
    threads: int
    seed: int = 0
    prompt: str = "a red circle moving right on a black background"
    model: str | None = None
    checkpoint: tuple[str, ...] = ()
    random_seed: int | None = None
    kind: str = "tmd"
    blocks: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        values = json.loads(text)
        return cls(**{**values, "checkpoint": tuple(values["checkpoint"])})
