"""The two graphs of a TMD student."""

from __future__ import annotations

from torch import Tensor, nn

from tmd_ref.student import FlowHead, TMDStudent, flow_head_step

from .graph import Graph, Interface, patches
from .wan import backbone

__all__ = ["FlowHeadStep", "backbone", "flow_head"]


class FlowHeadStep(nn.Module):
    """The flow head with the inner update around it, so that every host runs the same arithmetic."""

    def __init__(self, head: FlowHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        y: Tensor,
        noise: Tensor,
        s: Tensor,
        r: Tensor,
        features: Tensor,
        context: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> Tensor:
        return flow_head_step(self.head, y, noise, s, r, features, context, rope_cos, rope_sin)


def flow_head(model: TMDStudent, interface: Interface) -> Graph:
    """One step of the inner flow."""
    head = FlowHeadStep(model.head)
    return Graph("flow_head", head, *interface.of("flow_head"), patches(model.config.patch_size))
