"""Training of a flow-matching teacher on latents: the velocity of x_t = (1 - t)·x + t·noise, with condition dropout.

Wan's transformer is given; this makes the built-in model's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.trainer import Loss, step_generator
from tmd_ref.wan import WanTransformer

T_MIN, T_MAX = 0.001, 0.999


def shifted_uniform(count: int, shift: float, generator: torch.Generator) -> Tensor:
    """Times uniform on (0.001, 0.999), moved towards noise by shift·t / ((shift - 1)·t + 1)  (TMD A.2). `[count]`."""
    t = T_MIN + (T_MAX - T_MIN) * torch.rand(count, generator=generator)
    return (shift * t / ((shift - 1) * t + 1)).clamp(T_MIN, T_MAX)


def drop_condition(
    prompt_embeds: Tensor, null_embeds: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Replace the prompt of a random share of the samples by the negative prompt's embedding `[S,E]`.

    Returns the new `[B,S,E]` and which samples were dropped, bool `[B]`.
    """
    dropped = torch.rand(len(prompt_embeds), generator=generator) < share
    return torch.where(dropped[:, None, None], null_embeds, prompt_embeds), dropped


def teacher_loss(
    model: WanTransformer, data: LatentDataset, seed: int, batch: int, shift: float = 3.0, dropout: float = 0.1
) -> Loss:
    """Flow matching: mean squared error to noise - x at a random time."""
    rope = None

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal rope
        generator = step_generator(seed, step)
        x, prompt_embeds = data.batch(batch, generator)
        prompt_embeds, _ = drop_condition(prompt_embeds, data.null_embeds, dropout, generator)
        t = shifted_uniform(batch, shift, generator)
        noise = torch.randn(x.shape, generator=generator)
        weight = t[:, None, None, None, None]
        rope = rope or data.rope(model.config)
        velocity = model((1 - weight) * x + weight * noise, t, prompt_embeds, rope)
        return (velocity - (noise - x)).square().mean(), {}

    return loss
