"""Weights from a seed: a model of any size without a download, whose outputs are about 1 and depend on every weight.

Training's initial values would not do: they are zero in places, and a graph that drops a factor of zero looks right.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def random_tensor(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Float32 values of `shape` that depend on `seed` and `name` alone, and on torch's build in their last bit.

    `name` is that of the weight in the whole model, such as "student.backbone.blocks.0.modulation".
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    mean, spread = _distribution(name, shape)
    return torch.empty(shape, dtype=torch.float32).normal_(mean, spread, generator=generator)


def _distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation that keep the size of activations from layer to layer."""
    *_, owner, key = ("", *name.split("."))
    if key == "gamma" or ("norm" in owner and key == "weight"):
        return 1.0, 0.1
    if key == "modulation":
        return 0.0, 0.3
    if key == "gate" or owner in ("token_embedding", "embedding"):
        return 0.0, 1.0
    if len(shape) == 1:
        return 0.0, 0.1
    spread = shape[1:].numel() ** -0.5
    # UMT5 does not divide its scores by sqrt(head_dim): with a plain q its softmax would pick a single token.
    return 0.0, spread / 8 if name.endswith(".attn.q.weight") else spread
