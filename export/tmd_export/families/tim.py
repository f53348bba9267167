"""Transition Models: stills in one denoising graph, whose steps go from any time to any earlier one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..presets.tim import PRESETS
from .family import ExportFamily, Request

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..sources.source import Source
    from .family import Arrays, Builder


JUMPS = (1, 4, 16)
"""Numbers of steps to calibrate on, with steps of very different lengths."""


def _still(side: int) -> dict[str, int]:
    return {"frames": 1, "width": side, "height": side, "fps": 1}


class _Tim(ExportFamily):
    name = "tim"
    models = ("tim-t2i", "tim-c2i-256", "tim-c2i-512", "tim-tiny")
    built_in = ("tim-tiny",)
    presets = PRESETS
    videos = {"tim-tiny": _still(64), "tim-c2i-256": _still(256), "tim-c2i-512": _still(512)}  # noqa: RUF012
    known_by = "is a Transition Model"
    # The others are other people's models, each in a folder of its own.
    missing_parts = "name its folder (--text-encoder for text_encoder, --decoder for the others)"
    exact = r"(t|delta|x)_embedder|final_layer"
    products = r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q|proj)|mlp\.(fc1_g|fc1_x|fc2))|sides\.\d+\.kv"

    small_patches = (1, 8, 8)

    def samplings(self, sampler: Any) -> list[tuple[int, int]]:
        """A few, from the shortest run to a long one: a step may have any length."""
        return [(steps, 1) for steps in sorted({*JUMPS, sampler.steps})]

    def beside(self, part: str, inputs: Arrays) -> list[Arrays]:
        """From each time between also the jump to 0, which ends a run with a deadline."""
        if part != "flow_head" or inputs["t"][0] == 1 or inputs["r"][0] == 0:
            return []
        return [{**inputs, "r": 0 * inputs["r"]}]

    def compared(self, part: str, inputs: Arrays) -> Arrays:
        """A jump of length 1, x - F: a short one would hide what F loses."""
        if part != "flow_head":
            return inputs
        return {**inputs, "guidance": inputs["guidance"] / (inputs["t"] - inputs["r"])}

    def found_in(self, checkpoints: Sequence[Path]) -> list[str]:
        from ..sources.tim import find_tim

        return find_tim(checkpoints)

    def open(self, request: Request) -> Source:
        from ..sources.tim import open_tim

        if request.model is None:
            raise ValueError("a Transition Model is opened by its name: see found_in")
        return open_tim(request.model, request.checkpoints, request.seed, request.decoder, request.text_encoder)

    def builders(self) -> dict[str, Builder]:
        from ..graphs.tim import prompt, transition

        return {**super().builders(), "backbone": prompt, "flow_head": transition}

    def has_products(self, part: str, model: Any) -> bool:
        return part == "flow_head" or model.classes is None  # the other graph is a table of the classes then


TIM = _Tim()
