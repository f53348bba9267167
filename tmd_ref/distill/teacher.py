"""Training of a flow-matching teacher on latents: the velocity of x_t = (1 - t)·x + t·noise, with condition dropout.

Wan's transformer is given; this makes the built-in model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.draws import Draws, mix
from tmd_ref.distill.parallel import bare, within
from tmd_ref.distill.trainer import Objective


def drop_condition(prompt_embeds: Tensor, null_embeds: Tensor, share: float, draws: Draws) -> tuple[Tensor, Tensor]:
    """Replace the prompt of a random share of the samples by the negative prompt's embedding `[S,E]`.

    Returns the new `[B,S,E]` and which samples were dropped, bool `[B]`.
    """
    dropped = draws.uniform() < share
    return torch.where(dropped[:, None, None], null_embeds.to(prompt_embeds.device), prompt_embeds), dropped


def teacher_loss(
    model: Any, data: LatentDataset, shift: float = 3.0, dropout: float = 0.1, adaptive: float | None = None
) -> Objective:
    """Flow matching: mean squared error L to noise - x at a random time. `model`: a WanTransformer, sharded or not.

    With `adaptive` = c, a sample's loss is L/(sg(L) + c), so that easy times teach as much as hard ones  (the weight of
    MeanFlow, arXiv 2505.13447, section 4.3, with its p = 1).
    """
    config = bare(model).config

    def loss(draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x, prompt_embeds = data.sample(draws)
        prompt_embeds, _ = drop_condition(prompt_embeds, data.null_embeds, dropout, draws)
        t = draws.times(shift)
        noise = draws.normal(x.shape[1:])
        rope = data.rope(config, x.device)
        velocity = within(model, lambda network: network(mix(x, noise, t), t, prompt_embeds, rope))
        error = (velocity - (noise - x)).square().flatten(1).mean(1)
        if adaptive is None:
            return error.mean(), {}
        return (error / (error.detach() + adaptive)).mean(), {"error": error.detach().mean()}

    return loss
