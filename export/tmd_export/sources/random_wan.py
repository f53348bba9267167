"""Wan transformers, and students of them, with weights from a seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tmd_ref.student import TMDStudent
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Config, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig
from tmd_ref.wan import WAN_CONFIGS, WanConfig

from .random_weights import random_tensor
from .source import TOKENIZER, built_in_folder, on_meta
from .wan21 import HEAD_BLOCKS, Wan21Source, vae_name


class RandomSource(Wan21Source):
    """A model of the right architecture with weights from a seed, for tests and for sizing; it shows noise."""

    trained = False

    def __init__(
        self,
        model: str,
        seed: int,
        *,
        wan: WanConfig | None = None,
        head_blocks: int | None = None,
        fusion: str | None = "gated",
        vae: WanVAEConfig | None = None,
        text: UMT5Config | None = None,
        gate: float | None = None,
    ) -> None:
        """`model` is one of those of Wan, or any name if all sizes are given. `fusion` None: without inner flow;
        then `gate` makes a flow map."""
        self.model, self.seed, self.fusion, self.gate = model, seed, fusion, gate
        self.origin = f"random weights, seed {seed}"
        self.wan = wan or WAN_CONFIGS[model]
        self.head_blocks = head_blocks or HEAD_BLOCKS[model]
        self._vae_config = vae or WAN_VAE_CONFIGS[vae_name(model, self.wan)]
        self._text = text or UMT5_CONFIGS["tiny" if model == "tiny" else "umt5-xxl"]
        tokenizer = built_in_folder() / TOKENIZER
        self.tokenizer = tokenizer if model == "tiny" and tokenizer.is_file() else None
        # 5.7 billion parameters of text encoder are of no use without a tokenizer, unless somebody asks for them.
        self.default_parts = tuple(
            part for part in self.parts if part != "text_encoder" or self._text != UMT5_CONFIGS["umt5-xxl"]
        )
        self._shapes: dict[str, dict[str, torch.Size]] = {}

    @property
    def vae(self) -> WanVAEConfig:
        return self._vae_config

    def check(self, parts: tuple[str, ...]) -> None:
        """Everything can be built."""

    def module(self, which: str) -> nn.Module:
        makers: dict[str, Callable[[], nn.Module]] = {
            "student": self._student,
            "vae": lambda: WanVAE(self.vae),
            "text_encoder": lambda: UMT5Encoder(self._text),
        }
        return on_meta(makers[which])

    def tensor(self, which: str, name: str) -> Tensor:
        if which not in self._shapes:
            self._shapes[which] = {key: weight.shape for key, weight in self.module(which).state_dict().items()}
        return random_tensor(f"{which}.{name}", self._shapes[which][name], self.seed)

    def _student(self) -> nn.Module:
        if self.fusion is None:
            return self.without_flow()
        return TMDStudent(self.wan, self.head_blocks, self.fusion)
