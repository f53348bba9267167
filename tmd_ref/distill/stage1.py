"""Stage 1 of Transition Matching Distillation: TM-MeanFlow, the pre-training of the flow head.

Algorithm 2 of the paper (arXiv 2601.09881), stage one, with the choices of its appendix A.2. Names as in the paper:
x data, x1 outer noise, y = x1 - x the inner target, y1 inner noise, s > r the inner times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.teacher import drop_condition, shifted_uniform
from tmd_ref.distill.trainer import Loss, step_generator
from tmd_ref.meanflow import finite_difference_jvp
from tmd_ref.samplers import shift_grid
from tmd_ref.student import TMDStudent


def sample_inner_times(
    count: int, inner_steps: int, generator: torch.Generator, instant_share: float = 0.75, shift: float = 3.0
) -> tuple[Tensor, Tensor]:
    """(s, r): s uniform and shifted, r the largest node of the student's inner grid not above s  (TMD A.2).

    The first `instant_share` of the samples get r = s, where the target needs no derivative. Float32 `[count]` each.
    """
    s = shifted_uniform(count, shift, generator)
    grid = torch.from_numpy(shift_grid(inner_steps, 10.0)).float()
    r = grid[torch.searchsorted(grid, s, right=True) - 1]
    # a fixed number of the batch, not a coin per sample: the same share with less noise, and shapes that do not change
    instant = torch.arange(count) < round(count * instant_share)
    return s, torch.where(instant, s, r)


def tm_meanflow_loss(
    student: TMDStudent,
    data: LatentDataset,
    seed: int,
    batch: int,
    outer_steps: int,
    inner_steps: int,
    guidance: float = 3.0,
    dropout: float = 0.1,
    instant_share: float = 0.75,
    delta: float = 5e-3,
    weight_constant: float = 1.0,
) -> Loss:
    """MeanFlow on the inner flow, conditioned on backbone features that carry gradient  (TMD Eq. 8-10, 14).

    u = y1 - head; target u' = v - (s - r)·du/ds with v = y1 - y guided against the negative prompt; loss
    |u - u'|² / sg(|u - u'|² + c·d), d the number of elements of y, c = `weight_constant` (the paper: 1 for 1.3B).
    Guidance takes the student's own velocity at r = s for the negative prompt; samples whose prompt was dropped keep
    the unguided v. The derivative is a central difference along (v, 1), backbone features and r fixed.
    """
    outer_grid = torch.from_numpy(shift_grid(outer_steps, 10.0)).float()
    rope = data.rope(student.config)

    def loss(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = step_generator(seed, step)
        x, prompt_embeds = data.batch(batch, generator)
        prompt_embeds, dropped = drop_condition(prompt_embeds, data.null_embeds, dropout, generator)
        x1 = torch.randn(x.shape, generator=generator)
        y1 = torch.randn(x.shape, generator=generator)
        t = outer_grid[torch.randint(1, outer_steps + 1, (batch,), generator=generator)]
        s, r = sample_inner_times(batch, inner_steps, generator, instant_share)
        x_t = (1 - _like(t, x)) * x + _like(t, x) * x1
        y = x1 - x
        y_s = (1 - _like(s, y)) * y + _like(s, y) * y1

        features, context = student.backbone(x_t, t, prompt_embeds, *rope)
        with torch.no_grad():
            negative = student.backbone(x_t, t, data.null_embeds.expand_as(prompt_embeds), *rope)
            head_negative = student.head(y_s, s, s, *negative, *rope)
            guided = head_negative + guidance * (y - head_negative)
            target_velocity = y1 - torch.where(_like(dropped, y), y, guided)
            derivative = torch.zeros_like(y)
            apart = (r < s).nonzero().squeeze(1)
            if len(apart):
                derivative[apart] = finite_difference_jvp(
                    lambda y_at, s_at: y1[apart]
                    - student.head(y_at, s_at, r[apart], features[apart], context[apart], *rope),
                    y_s[apart], s[apart], target_velocity[apart], delta, r=r[apart],
                )  # fmt: skip
            target = target_velocity - _like(s - r, y) * derivative
        u = y1 - student.head(y_s, s, r, features, context, *rope)
        error = (u - target).square().flatten(1)
        squared = error.sum(1)
        weighted = squared / (squared.detach() + weight_constant * error.shape[1])
        per_element = error.mean(1)
        instant = (r == s).float()
        gate = getattr(student.head.fusion, "gate", per_element.new_zeros(1))  # the concat fusion has none
        return weighted.mean(), {
            "instant": (per_element * instant).sum() / instant.sum().clamp_min(1),
            "interval": (per_element * (1 - instant)).sum() / (1 - instant).sum().clamp_min(1),
            "gate": gate.sigmoid().mean(),
        }

    return loss


def _like(values: Tensor, target: Tensor) -> Tensor:
    return values.view(-1, *[1] * (target.dim() - 1))
