"""The graph `update`: what one step makes of x and of the velocity that the model gives for it.

Every host computes its updates with it, so that all of them get the same values. Which factors a rule has for the sum
is in `tmd_engines.bundle.families.rules`.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..parts import UPDATE
from .graph import Graph, Interface


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
        guidance, t, c_x, c_v, c_noise, c_1, c_2 = coefficients.split(1)
        v = negative + guidance * (velocity - negative)
        x_next = c_x * x + c_v * v + c_noise * noise + c_1 * before_1 + c_2 * before_2
        data = x - t * v
        return x_next, data, x_next.abs().reshape(-1).mean(0, keepdim=True)


def update(interface: Interface) -> Graph:
    return Graph(UPDATE, Update(), *interface.of(UPDATE))
