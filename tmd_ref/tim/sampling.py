"""Sampling of a TiM: any falling list of times, one transition between each two  (paper, Algorithm 2; OT-FM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def uniform_times(steps: int) -> list[float]:
    """steps + 1 equispaced times from 1 (noise) to 0 (data). Raises ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"a schedule needs at least one step, not {steps}.")
    return [1 - k / steps for k in range(steps + 1)]


@torch.no_grad()
def tim_sample(
    network: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    condition: Tensor,
    times: Sequence[float],
    null: Tensor | None = None,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    instant: bool = False,
    rho: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x_r = x_t - (t - r)·F(x_t, t, r) through `times`, from noise, or from (1 - t)·data + t·noise at a first t < 1.

    x `[B, C, H, W]`; `network(x, t, r, condition)` gives F, t and r `[B]`. With `guidance` g and `null`, as large as
    `condition`, F = F_null + g·(F_cond - F_null) while interval[0] < t < interval[1], both in one batch. The bounds are
    strict as in the released code, so that (0, 1) leaves the first step from t = 1 unguided.
    `rho` is that of the stochastic sampler: every step but the first and the last also takes rho·(t - r) of the noise
    that F sees in x, x + (1 - t)·F, out of it and puts √(2·rho·t·(t - r)) of fresh noise in, from `generator`.
    `instant`: ask for F at r = t, the velocity itself, which makes this Euler's method for any flow-matching model.
    Raises ValueError if the times do not fall within 1..0.
    """
    if len(times) < 2 or times[0] > 1 or times[-1] < 0 or any(b >= a for a, b in pairwise(times)):
        raise ValueError(f"times {list(times)} must fall from at most 1 to at least 0, and be two or more.")
    for step, (t, r) in enumerate(pairwise(times)):
        guided = null is not None and guidance != 1 and interval[0] < t < interval[1]
        given = torch.cat((condition, null)) if guided and null is not None else condition
        both = torch.cat((x, x)) if guided else x
        at, to = (both.new_full((len(both),), value) for value in (t, t if instant else r))
        f = network(both, at, to, given)
        if guided:
            with_prompt, without = f.chunk(2)
            f = without + guidance * (with_prompt - without)
        moved = x - (t - r) * f
        if rho and 0 < step < len(times) - 2:
            fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            moved = moved - rho * (t - r) * (x + (1 - t) * f) + (2 * rho * t * (t - r)) ** 0.5 * fresh
        x = moved
    return x
