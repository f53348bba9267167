"""The work of a contender: plain data, sent to its process as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

RIVALS = ("torch", "torch-compile", "diffusers", "stable-diffusion.cpp", "onnxruntime", "openvino")

NO_WARM_UP = ("stable-diffusion.cpp",)
"""Contenders that compile and pack nothing: their first run, which takes minutes, counts as a round."""

STAGE_OF = {"text_encoder": "text", "backbone": "denoise", "decoder_first": "decode"}
"""A graph of a bundle -> the stage that the bundle can be measured in."""


@dataclass(frozen=True)
class Work:
    """One denoising job and where its weights come from.

    `model`, `checkpoint` and `random_seed` as in `tmd_export.open_source`, None where only a bundle is given; `kind` is
    the family of random weights. Width and height are in pixels. `blocks`: transformer blocks of a shortened model with
    random weights. `stages` are those that are measured, in their order: some of "text", "denoise" and "decode".
    `published` is the folder with the weights in their authors' files, None where no contender reads them.
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
    stages: tuple[str, ...] = ("text", "denoise", "decode")
    published: str | None = None

    @property
    def main_stage(self) -> str:
        """The stage whose processor time is told: the loop, or what is measured alone."""
        return "denoise" if "denoise" in self.stages else self.stages[-1]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Work:
        values = json.loads(text)
        return cls(**{**values, "checkpoint": tuple(values["checkpoint"]), "stages": tuple(values["stages"])})
