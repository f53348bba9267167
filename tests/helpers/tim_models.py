"""Small Transition Models, with every weight random, as the reference computes them and as a bundle holds them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tmd_engines import Bundle, load
from tmd_export.sources.tim import RandomTiM
from tmd_ref.tim.model import TiM, TiMConfig
from tmd_ref.tim.split import uncut

PARTS = ("backbone", "flow_head")
SIZES = {"dim": 48, "num_heads": 2, "num_layers": 2, "in_channels": 3, "modulation_dim": 16, "freq_dim": 12}
TEXT = TiMConfig(**SIZES, patch=1, text_dim=20, text_len=8)
CLASSES = TiMConfig(**SIZES, patch=2, num_classes=5)
TEXT_16 = replace(TEXT, in_channels=16)  # with the latents of Wan's VAE, which small bundles have
CLASSES_16 = replace(CLASSES, in_channels=16, num_layers=1)


def randomised(config: TiMConfig, dtype: torch.dtype = torch.float32) -> TiM:
    """No weight at its initial zero or one: each must matter."""
    torch.manual_seed(0)
    model = TiM(config).to(dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        spread = weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.2
        weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, spread)
    return model


def condition_of(config: TiMConfig, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if config.text_dim is None:
        return torch.tensor([5, 2, 0][:batch])
    return torch.randn(batch, 6, config.text_dim, dtype=dtype)


def network(source: RandomTiM) -> TiM:
    """The reference with the weights of the source."""
    names = [name for name, _ in source.module("student").named_parameters()]
    with torch.device("meta"):
        model = TiM(source.config)
    model.load_state_dict({uncut(name): source.tensor("student", name) for name in names}, assign=True)
    return model.eval().requires_grad_(False)


def run(bundle: Bundle, graph: str, given: dict[str, Tensor], dims: dict[str, int], engine: str) -> np.ndarray:
    with load(bundle, graph, engine) as loaded:
        outputs = {name: loaded.empty(name, **dims) for name in loaded.outputs}
        loaded.run({name: value.numpy() for name, value in given.items()}, outputs)
        (result,) = outputs.values()
        return result
