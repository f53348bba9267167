"""Wan transformers that are flow maps (AnyFlow)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..presets.anyflow import PRESETS
from .wan import Wan21

if TYPE_CHECKING:
    from .family import Builder


class _AnyFlow(Wan21):
    name = "anyflow"
    models = ("wan1.3b", "wan14b")
    built_in = ()
    presets = PRESETS
    known_by = "is a flow map, which is told two times at once"
    fusion = None
    flow_map = True

    def samplings(self, sampler: Any) -> list[tuple[int, int]]:
        """One step goes from noise to data, several through the times between."""
        return [(1, 1), (sampler.steps, 1)]

    def builders(self) -> dict[str, Builder]:
        from ..graphs.wan import backbone, flow_head

        return {**super().builders(), "backbone": backbone, "flow_head": flow_head}


ANYFLOW = _AnyFlow()
