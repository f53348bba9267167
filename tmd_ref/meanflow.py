"""The derivative along a flow that MeanFlow's target needs: by differences, or exactly in forward mode.

What it is not: the training objective, which belongs to the distillation.
"""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def finite_difference_jvp(
    fn: Callable[[Tensor, Tensor], Tensor],
    y: Tensor,
    s: Tensor,
    v: Tensor,
    delta: float = 5e-3,
    r: Tensor | None = None,
    s_min: float = 1e-3,
    s_max: float = 0.999,
) -> Tensor:
    """d/ds fn(y_s, s) along dy/ds = v, by differences: [fn(y + δv, s + δ) - fn(y - δv, s - δ)] / 2δ  (TMD A.2).

    y and v `[B, ...]`, s and r `[B]` in 0..1; fn(y, s) gives `[B, ...]` and holds everything else fixed (features, r).
    A sample too near an end takes a one-sided difference: forward where s - δ would fall below s_min or to r or below,
    backward where s + δ would pass s_max, and backward where both hold (then s - r <= 2δ, and the target's factor s - r
    makes the derivative negligible). Two evaluations of fn, in the dtype of y; the differences are taken in float64.

    A time embedding of 1000·s has components that turn by up to 1000·δ radians within a step: they are averaged over,
    here as in the paper. Returns the derivative in the dtype of fn's output. Raises ValueError if delta <= 0.
    """
    if delta <= 0:
        raise ValueError(f"delta is {delta}: the step of the difference must be positive; the paper uses 5e-3.")
    s64 = s.double()
    up, down = s64 + delta, s64 - delta
    floor = torch.full_like(s64, s_min) if r is None else r.double()
    at_top = up > s_max
    at_bottom = ((down < s_min) | (down <= floor)) & ~at_top
    up, down = torch.where(at_top, s64, up), torch.where(at_bottom, s64, down)

    def at(time: Tensor) -> Tensor:
        moved = y.double() + _like(time - s64, y) * v.double()
        return fn(moved.to(y.dtype), time.to(s.dtype))

    high, low = at(up), at(down)
    return ((high.double() - low.double()) / _like(up - down, high)).to(high.dtype)


@torch.no_grad()
def exact_jvp(fn: Callable[[Tensor, Tensor], Tensor], y: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The same derivative in forward mode: one pass of about twice the cost, plain attention, no sharded weights.

    Arguments and result as `finite_difference_jvp`.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        return torch.func.jvp(fn, (y, s), (v, torch.ones_like(s)))[1]


def _like(values: Tensor, target: Tensor) -> Tensor:
    """`[B]` to `[B, 1, ...]`, to multiply `target`."""
    return values.view(-1, *[1] * (target.dim() - 1))
