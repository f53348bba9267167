"""The two graphs of a Wan transformer without inner flow."""

from __future__ import annotations

from tmd_ref.split import SplitWan
from tmd_ref.student import TMDStudent

from .graph import Graph, Interface, patches


def backbone(model: SplitWan | TMDStudent, interface: Interface, name: str = "backbone") -> Graph:
    """Everything before the flow head, once per step."""
    return Graph(name, model.backbone, *interface.of(name), patches(model.config.patch_size))


def flow_head(model: SplitWan, interface: Interface, name: str = "flow_head") -> Graph:
    """The rest of the transformer."""
    return Graph(name, model.head, *interface.of(name), patches(model.config.patch_size))
