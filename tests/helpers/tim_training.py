"""A small Transition Model to train, and data in place of prepared shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.tim_config import Training
from tmd_ref.tim.model import TiMConfig

CONFIG = TiMConfig(
    dim=24, num_heads=2, num_layers=2, in_channels=2, patch=1, modulation_dim=8, text_dim=8, text_len=4, freq_dim=16
)


class Data(LatentDataset):
    """Random stills and embeddings in place of prepared shards; the stills are N(0, `spread`²)."""

    def __init__(self, spread: float = 1.0, size: int = 2) -> None:
        self.spread, self.size = spread, size
        self.null_embeds = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        return self.spread * draws.normal((2, 1, self.size, self.size)), draws.normal((4, 8))


def settings(**changes: Any) -> Training:
    return Training.model_validate({"steps": 4, "batch": 4, "optimizer": {"lr": 1e-3, "ema": 0.5}, **changes})
