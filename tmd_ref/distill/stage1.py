"""Stage 1 of Transition Matching Distillation: TM-MeanFlow, the pre-training of the flow head.

Algorithm 2 of the paper (arXiv 2601.09881), stage one, with the choices of its appendix A.2. Names as in the paper:
x data, x1 outer noise, y = x1 - x the inner target, y1 inner noise, s > r the inner times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.draws import Draws, like, mix
from tmd_ref.distill.parallel import bare, whole, within
from tmd_ref.distill.teacher import drop_condition
from tmd_ref.distill.trainer import Objective
from tmd_ref.meanflow import exact_jvp, finite_difference_jvp
from tmd_ref.samplers import shift_grid
from tmd_ref.student import TMDStudent
from tmd_ref.wan import without_autocast


def sample_inner_times(
    draws: Draws, inner_steps: int, instant_share: float = 0.75, shift: float = 3.0, grid_shift: float = 10.0
) -> tuple[Tensor, Tensor]:
    """(s, r): s uniform and shifted, r the largest node of the student's inner grid not above s  (TMD A.2).

    `instant_share` of the step's samples get r = s, where the target needs no derivative. Float32 `[n]` each.
    """
    s = draws.times(shift)
    grid = torch.from_numpy(shift_grid(inner_steps, grid_shift)).to(s)
    r = grid[torch.searchsorted(grid, s, right=True) - 1]
    return s, torch.where(draws.first(instant_share), s, r)


def average_velocity(average: str, head: Tensor, y_s: Tensor, s: Tensor, y1: Tensor) -> Tensor:
    """u over (r, s) of the inner flow, from the head's output. Both readings are y1 - y where r = s and y is certain.

    "noise": y1 - head, Eq. 14 as printed. "state": (y_s - head)/s, the paper's variant for another target. The true u
    is a function of y_s; y1 is not, so the best that "noise" can learn replaces E[y1 | y_s] along the flow by y1, and
    where the features leave y uncertain its map shrinks towards the mean: for y ~ N(0, 1) one step from s = 1 gives
    0.62·y1 instead of y1. "state" has no such error (`tests/unit/ref/test_distill_closed_forms.py`), and ends at r = 0
    in the head's output, as "noise" does in one step; in more, a sampler that reads u as printed then differs by the
    weight of the first steps, 9 % for N = 2.
    """
    if average == "noise":
        return y1 - head
    if average == "state":
        return (y_s - head) / like(s, y_s)
    raise ValueError(f"average {average!r}: choose noise or state.")


def tm_meanflow_loss(
    student: Any,
    data: LatentDataset,
    outer_steps: int,
    inner_steps: int,
    guidance: float = 3.0,
    dropout: float = 0.1,
    instant_share: float = 0.75,
    delta: float | None = 5e-3,
    weight_constant: float = 1.0,
    average: str = "noise",
    shifts: tuple[float, float, float] = (10.0, 10.0, 3.0),
) -> Objective:
    """MeanFlow on the inner flow, conditioned on backbone features that carry gradient  (TMD Eq. 8-10, 14).

    u = y1 - head; target u' = v - (s - r)·du/ds with v = y1 - y guided against the negative prompt; loss
    |u - u'|² / sg(|u - u'|² + c·d), d the number of elements of y, c = `weight_constant` (the paper: 1 for 1.3B).
    Guidance takes the student's own velocity at r = s for the negative prompt; samples whose prompt was dropped keep
    the unguided v. The derivative along (v, 1), features and r fixed, is a central difference of step `delta`, or exact
    for None. `instant_share` = 1 is plain transition matching, the paper's ablation: r = s always.
    `average` says how u is read from the head, see `average_velocity`.
    `student`: a TMDStudent, sharded or not; `shifts`: of the outer grid, of the inner grid, of s.
    """
    config = bare(student).config
    outer_shift, inner_shift, s_shift = shifts
    outer_grid = torch.from_numpy(shift_grid(outer_steps, outer_shift)).float()

    def loss(draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        x, prompt_embeds = data.sample(draws)
        null_embeds = data.null_embeds.to(x.device).expand_as(prompt_embeds)
        prompt_embeds, dropped = drop_condition(prompt_embeds, data.null_embeds, dropout, draws)
        x1, y1 = draws.normal(x.shape[1:]), draws.normal(x.shape[1:])
        t = outer_grid.to(x.device)[1 + draws.integers(outer_steps)]
        s, r = sample_inner_times(draws, inner_steps, instant_share, s_shift, inner_shift)
        x_t, y = mix(x, x1, t), x1 - x
        y_s = mix(y, y1, s)
        rope = data.rope(config, x.device)

        def run(network: TMDStudent) -> tuple[Tensor, Tensor]:
            features, context = network.backbone(x_t, t, prompt_embeds, *rope)
            with torch.no_grad():
                guided = y
                if guidance != 1:
                    negative = network.backbone(x_t, t, null_embeds, *rope)
                    head_negative = network.head(y_s, s, s, *negative, *rope)
                    guided = torch.where(like(dropped, y), y, head_negative + guidance * (y - head_negative))
                velocity = y1 - guided
                derivative = torch.zeros_like(y)
                if instant_share < 1:
                    # at least one sample, so that every process runs the same passes
                    apart = (r < s).nonzero().squeeze(1) if (r < s).any() else torch.tensor([0], device=x.device)

                    def u_at(y_at: Tensor, s_at: Tensor) -> Tensor:
                        with without_autocast(y_at):  # bfloat16 would drown the difference
                            head = network.head(y_at, s_at, r[apart], features[apart], context[apart], *rope)
                        return average_velocity(average, head, y_at, s_at, y1[apart])

                    at = y_s[apart], s[apart], velocity[apart]
                    derivative[apart] = (
                        exact_jvp(u_at, *at) if delta is None else finite_difference_jvp(u_at, *at, delta, r=r[apart])
                    )
                target = velocity - like(s - r, y) * derivative
            head = network.head(y_s, s, r, features, context, *rope)
            return average_velocity(average, head, y_s, s, y1), target

        u, target = within(student, run)
        error = u - target
        if average == "state":
            error = like(s, y) * error  # the error of the head; that of u would weigh small s by 1/s²
        error = error.square().flatten(1)
        squared = error.sum(1)
        weighted = squared / (squared.detach() + weight_constant * error.shape[1])
        per_element = error.mean(1).detach()
        # means over the step's samples of either kind, as sums that processes and micro-batches can average
        instant = draws.first(instant_share)
        share = round(draws.batch * instant_share) / draws.batch
        scalars = {"instant": (per_element * instant).mean() / share} if share > 0 else {}
        if share < 1:
            scalars["interval"] = (per_element * ~instant).mean() / (1 - share)
        gate = getattr(bare(student).head.fusion, "gate", None)  # the concat fusion has none
        return weighted.mean(), scalars if gate is None else {**scalars, "gate": whole(gate.detach()).sigmoid().mean()}

    return loss
