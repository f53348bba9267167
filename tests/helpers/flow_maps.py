"""A flow map of a few kilobytes, and the same weights in diffusers' class of AnyFlow."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.synthetic_checkpoints import WAN, transformer_config
from tmd_export.checkpoints.names import converted
from tmd_ref.flow_map import FlowMapWan

CONFIG = WAN


def random_flow_map(seed: int = 0) -> FlowMapWan:
    torch.manual_seed(seed)
    ours = FlowMapWan(CONFIG).eval().requires_grad_(False)
    for name, weight in ours.named_parameters():  # also what starts at zero or one must matter
        weight.add_(0.1 * torch.randn_like(weight))
        if "_embedding.2" in name and name.endswith("weight"):
            weight.mul_(4)  # times
    return ours


def theirs_of(ours: FlowMapWan) -> Any:
    """diffusers' AnyFlow transformer with the weights of `ours`."""
    import diffusers

    words = {key: value for key, value in transformer_config(CONFIG).items() if key != "qk_norm"}
    theirs = diffusers.AnyFlowTransformer3DModel(**words, gate_value=ours.gate, deltatime_type="r").eval()
    theirs.load_state_dict({converted("transformer", k): v for k, v in ours.state_dict().items()}, strict=True)
    return theirs
