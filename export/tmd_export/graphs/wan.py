"""The two graphs of a Wan transformer without inner flow."""

from __future__ import annotations

from tmd_ref.split import SplitWan
from tmd_ref.student import TMDStudent

from .graph import Graph, Interface, patches


def backbone(model: SplitWan | TMDStudent, interface: Interface) -> Graph:
    """Everything before the flow head, once per step."""
    return Graph("backbone", model.backbone, *interface.of("backbone"), patches(model.config.patch_size))


def flow_head(model: SplitWan, interface: Interface) -> Graph:
    """The rest of the transformer."""
    return Graph("flow_head", model.head, *interface.of("flow_head"), patches(model.config.patch_size))
