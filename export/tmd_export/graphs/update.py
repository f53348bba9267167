"""The graph `update`: what one step makes of x and of the velocity that the model gives for it.

Every host computes its updates with it, so that all of them get the same values. Which factors a rule has for the sum
is in `tmd_engines.bundle.families.rules`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..parts import UPDATE
from .graph import Graph, Interface


def _next(
    x: Tensor,
    velocity: Tensor,
    negative: Tensor,
    noise: Tensor,
    before_1: Tensor,
    before_2: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_next and the data prediction."""
    guidance, t, c_x, c_v, c_noise, c_1, c_2 = coefficients.split(1)
    v = negative + guidance * (velocity - negative)
    x_next = c_x * x + c_v * v + c_noise * noise + c_1 * before_1 + c_2 * before_2
    return x_next, x - t * v


def _magnitude(x_next: Tensor) -> Tensor:
    return x_next.abs().reshape(-1).mean(0, keepdim=True)


class Update(nn.Module):
    """Guidance, the next x, the data prediction and the mean of |x_next|, in float32 and in this order.

    The mean is NaN or Inf exactly if a value of x_next is. A slot that a rule does not use has the factor 0, and a
    buffer with finite values.
    """

    def forward(
        self,
        x: Tensor,
        velocity: Tensor,
        negative: Tensor,
        noise: Tensor,
        before_1: Tensor,
        before_2: Tensor,
        coefficients: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x_next, data = _next(x, velocity, negative, noise, before_1, before_2, coefficients)
        return x_next, data, _magnitude(x_next)


class HoldingUpdate(nn.Module):
    """`Update` of a model that can hold a picture as its first latent frame.

    In the frames where `held` `[T]` is 1, x_next and the data prediction are `picture` `[B, C, 1, H, W]`, to the last
    bit; where it is 0 they are those of `Update`. NaN is not covered up: 0 times NaN is NaN.
    """

    def forward(
        self,
        x: Tensor,
        velocity: Tensor,
        negative: Tensor,
        noise: Tensor,
        before_1: Tensor,
        before_2: Tensor,
        coefficients: Tensor,
        held: Tensor,
        picture: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        frames = held.view(-1, 1, 1)
        made = _next(x, velocity, negative, noise, before_1, before_2, coefficients)
        x_next, data = (each * (1 - frames) + picture * frames for each in made)
        return x_next, data, _magnitude(x_next)


def update(interface: Interface) -> Graph:
    inputs, outputs = interface.of(UPDATE)
    holds = any(spec.name == "held" for spec in inputs)
    return Graph(UPDATE, HoldingUpdate() if holds else Update(), inputs, outputs)
