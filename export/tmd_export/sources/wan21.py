"""What the sources of Wan's transformers have in common, with an inner flow or without."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from tmd_ref.first_frame import SplitFirstFrame
from tmd_ref.flow_map import FlowMapWan, SplitFlowMap
from tmd_ref.split import SplitWan
from tmd_ref.text import EOS_ID, PAD_ID
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAEConfig
from tmd_ref.wan import WanConfig, WanTransformer

from ..checkpoints.hub_cache import called
from ..checkpoints.names import converted, uncut
from ..errors import ExportError
from ..parts import PARTS, VIDEO_PARTS
from ..presets.wan import WAN21, WAN22
from .source import Source, vae_latents

# Of students with random weights; TMD's own choice for Wan is 5.
HEAD_BLOCKS = {"tiny": 2, "wan1.3b": 5, "wan14b": 5, "wan2.2-ti2v-5b": 5}


class Wan21Source(Source):
    """A transformer with the sizes `wan`, whose last `head_blocks` blocks are in the flow head.

    `fusion` is how the flow head of a student takes in the features; None: there is no inner flow. `gate` is the share
    of the second time in a flow map (`tmd_ref.flow_map`); None: it is told one time.
    """

    wan: WanConfig
    head_blocks: int
    fusion: str | None
    gate: float | None = None

    @property
    def family(self) -> str:  # type: ignore[override]  # it follows from the network
        if self.gate is not None:
            return "anyflow"
        return "wan" if self.fusion is None else "tmd"

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return PARTS if self.holds_picture else VIDEO_PARTS

    @property
    def holds_picture(self) -> bool:
        """Whether the model can hold a picture as the first frame of its video."""
        return is_wan22(self.wan) and self.fusion is None and self.gate is None

    def without_flow(self) -> nn.Module:
        """The transformer without inner flow, cut in two."""
        if self.gate is not None:
            return SplitFlowMap(FlowMapWan(self.wan, self.gate), self.head_blocks)
        split = SplitFirstFrame if self.holds_picture else SplitWan
        return split(WanTransformer(self.wan), self.head_blocks)

    @property
    def vae(self) -> WanVAEConfig:
        """Sizes and latent statistics of the VAE whose latents the transformer makes."""
        return WAN_VAE_CONFIGS[vae_name(self.model, self.wan)]

    def model_entry(self) -> dict[str, Any]:
        wan = self.wan
        return {
            "architecture": architecture(wan),
            "dim": wan.dim,
            "num_layers": wan.num_layers,
            "head_blocks": self.head_blocks,
            "num_heads": wan.num_heads,
            "head_dim": wan.head_dim,
            "patch_size": list(wan.patch_size),
            **({} if self.fusion is None else {"fusion": self.fusion}),
            **({"first_frame": True} if self.holds_picture else {}),
        }

    def latents_entry(self) -> dict[str, Any]:
        return vae_latents(self.vae)

    def text_entry(self) -> dict[str, Any]:
        return {"max_length": self.wan.text_len, "dim": self.wan.text_dim, "pad_id": PAD_ID, "eos_id": EOS_ID}

    def published_names(self, name: str) -> tuple[str, ...]:
        """Those of the transformer that was cut, in both layouts; of a student also its own."""
        original = uncut(name, self.wan.num_layers - self.head_blocks)
        return (original, converted("transformer", original), *(() if self.fusion is None else (name,)))

    def lora_note(self, path: Path) -> str | None:
        expert = re.search(r"(high|low)[_-]?noise", path.name, re.IGNORECASE)
        return expert and (
            f"by its name {called(path)} is for the {expert[1].lower()}-noise expert of a Wan2.2 A14B. Its tensors are "
            "those of any model of that size: if this checkpoint is another one, nothing here can tell."
        )


def check_architecture(found: WanConfig, wanted: WanConfig, model: str, where: Path) -> None:
    """Raises ExportError if the student in `where` has other sizes than `model`, which has those of `wanted`."""
    for name in (field.name for field in fields(found)):
        have, want = getattr(found, name), getattr(wanted, name)
        if have != want:
            raise ExportError(
                f"the student in {where} has {name} {have}, and {model} has {want}: this is another model. "
                "Choose its own --model, or export it from Python with tmd_export.FolderSource and a name of its own."
            )


def is_wan22(wan: WanConfig) -> bool:
    """Whether a transformer is Wan2.2-TI2V-5B or one made from it: no other has latents of so many channels."""
    return wan.in_channels == WAN_VAE_CONFIGS["wan2.2"].z_dim


def architecture(wan: WanConfig) -> str:
    """The manifest's `model.architecture` of a transformer."""
    return WAN22 if is_wan22(wan) else WAN21


def vae_name(model: str, wan: WanConfig) -> str:
    """Which of `WAN_VAE_CONFIGS` makes the latents of `model`, which has the transformer `wan`."""
    return "tiny" if model == "tiny" else "wan2.2" if is_wan22(wan) else "wan2.1"
