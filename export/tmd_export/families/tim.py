"""Transition Models: stills in one denoising graph, whose steps go from any time to any earlier one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..presets.tim import PRESETS
from .family import ExportFamily, Request

if TYPE_CHECKING:
    from ..sources.source import Source
    from .family import Builder


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

    def open(self, request: Request) -> Source:
        from ..sources.tim import open_tim

        return open_tim(request.model, request.checkpoints, request.seed, request.decoder, request.text_encoder)

    def builders(self) -> dict[str, Builder]:
        from ..graphs.tim import prompt, transition

        return {**super().builders(), "backbone": prompt, "flow_head": transition}

    def has_products(self, part: str, model: Any) -> bool:
        return part == "flow_head" or model.classes is None  # the other graph is a table of the classes then


TIM = _Tim()
