"""The objective of Transition Models (arXiv 2509.04394, section 3, appendix B) with the linear path of flow matching.

F(x_t, t, r) shall be the average velocity from t down to r, so that x_r = x_t - (t - r)·F. Wherever a jump starts it
must land in the same place, which gives the target F' = v - (t - r)·dF/dt, with v = noise - x and the derivative along
the path of a sample. For r = t this is flow matching, for r = 0 consistency training; with the derivative in forward
mode and without the interval weight it is MeanFlow. The alignment with features of another network that the authors
train with is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.draws import Draws, like, mix
from tmd_ref.distill.parallel import bare, within
from tmd_ref.distill.teacher import drop_condition
from tmd_ref.distill.tim_config import Training
from tmd_ref.distill.trainer import AveragedWeights, Objective
from tmd_ref.meanflow import exact_jvp, finite_difference_jvp
from tmd_ref.tim.model import TiM, rope_tables, token_grid
from tmd_ref.wan import without_autocast


def sample_times(
    draws: Draws, mean: float, spread: float, instant_share: float, zero_share: float
) -> tuple[Tensor, Tensor]:
    """(t, r), float32 `[n]` each: the later and the earlier of two logit-normal times  (paper, Table 11).

    The first `instant_share` of the step's samples have r = t, the last `zero_share` r = 0, as in the released code.
    """
    drawn = torch.sigmoid(mean + spread * draws.normal((2,)))
    t = drawn.amax(1)
    r = torch.where(draws.first(instant_share), t, drawn.amin(1))
    return t, torch.where(draws.first(1 - zero_share), r, 0.0)


def interval_weight(t: Tensor, r: Tensor) -> Tensor:
    """(1 + tan t - tan r)^(-1/2): long jumps, whose targets are less certain, weigh less  (section 3.3). `[n]`."""
    return (1 + t.tan() - r.tan()).rsqrt()


def transition_target(velocity: Tensor, t: Tensor, r: Tensor, derivative: Tensor) -> Tensor:
    """F' = v - (t - r)·dF/dt  (Eq. 9 for the linear path). `velocity` and `derivative` `[n, ...]`, times `[n]`."""
    return velocity - like(t - r, velocity) * derivative


def distance(f: Tensor, target: Tensor, directional: bool) -> Tensor:
    """Mean squared error and, if `directional`, 1 - the cosine between the channels of each place. `[n]`."""
    squared = (f - target).square().flatten(1).mean(1)
    return squared + (1 - F.cosine_similarity(f, target, dim=1)).flatten(1).mean(1) if directional else squared


def tim_loss(
    network: Any, data: LatentDataset, settings: Training, averaged: AveragedWeights | None = None
) -> Objective:
    """The loss of some samples: mean of w(t, r)·L/(sg(L) + c), L the `distance` to F'.

    `network`: a TiM, sharded or not. The derivative of samples with r < t is a central difference of step
    `settings.delta`, whose ends may leave 0..1 as in the released code, or exact. With `settings.guided`, v is
    truth·v + weight·F(x_t, t, t | prompt) + (1 - truth - weight)·F(x_t, t, t | null) of the averaged weights, for t
    inside its interval  (paper, Eq. 51). Raises ValueError if that is wanted without `averaged`.
    """
    if settings.guided is not None and averaged is None:
        raise ValueError("tim.guided takes its target from averaged weights: none are kept (tim.optimizer.ema).")
    config = bare(network).config
    rope_of: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def loss(draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        latents, prompt_embeds = data.sample(draws)
        x = latents.squeeze(2)  # stills: one latent frame
        prompt_embeds, _ = drop_condition(prompt_embeds, data.null_embeds, settings.dropout, draws)
        noise = draws.normal(x.shape[1:])
        t, r = sample_times(draws, settings.mean, settings.spread, settings.instant_share, settings.zero_share)
        x_t, velocity = mix(x, noise, t), noise - x
        if x.device not in rope_of:
            rope_of[x.device] = rope_tables(*token_grid(x, config.patch), config.head_dim, x.device)
        rope = rope_of[x.device]
        guided = velocity
        if settings.guided is not None and averaged is not None and draws.step >= settings.guided.after:
            null_embeds = data.null_embeds.to(prompt_embeds).expand_as(prompt_embeds)
            with averaged, torch.no_grad():
                f_prompt = within(network, lambda net: net(x_t, t, t, prompt_embeds, rope))
                f_null = within(network, lambda net: net(x_t, t, t, null_embeds, rope))
            truth, of_prompt, (low, high) = settings.guided.truth, settings.guided.weight, settings.guided.interval
            mixed = truth * velocity + of_prompt * f_prompt + (1 - truth - of_prompt) * f_null
            guided = torch.where(like((low <= t) & (t <= high), x), mixed, velocity)

        def run(net: TiM) -> tuple[Tensor, Tensor]:
            context = net.context(prompt_embeds).unbind()
            derivative = torch.zeros_like(x)
            if settings.instant_share < 1:
                # at least one sample, so that every process runs the same passes
                apart = (r < t).nonzero().squeeze(1) if (r < t).any() else torch.tensor([0], device=x.device)
                fixed = [block.detach()[apart] for block in context]

                def f_at(x_at: Tensor, t_at: Tensor) -> Tensor:
                    with without_autocast(x_at):  # bfloat16 would drown the difference
                        return net.velocity(x_at, t_at, r[apart], fixed, rope)

                at = x_t[apart], t[apart], velocity[apart]
                derivative[apart] = (
                    exact_jvp(f_at, *at)
                    if settings.derivative == "exact"
                    else finite_difference_jvp(f_at, *at, settings.delta, s_min=-torch.inf, s_max=torch.inf)
                )
            return net.velocity(x_t, t, r, context, rope), transition_target(guided, t, r, derivative)

        f, target = within(network, run)
        error = distance(f, target, settings.directional)
        weight = torch.ones_like(error)
        if settings.adaptive is not None:
            weight = weight / (error.detach() + settings.adaptive)
        instant = draws.first(settings.instant_share)
        if settings.interval_weight:
            weight = torch.where(instant, weight, weight * interval_weight(t, r))
        # means over the step's samples of either kind, as sums that processes and micro-batches can average
        share = round(draws.batch * settings.instant_share) / draws.batch
        scalars = {"instant": (error.detach() * instant).mean() / share} if share > 0 else {}
        if share < 1:
            scalars["interval"] = (error.detach() * ~instant).mean() / (1 - share)
        return (weight * error).mean(), scalars

    return loss
