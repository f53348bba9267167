"""Students of Transition Matching Distillation: Wan transformers with a flow head that has inner steps."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

from ..presets.tmd import PRESETS
from .wan import Wan21

if TYPE_CHECKING:
    from .family import Builder


class _Tmd(Wan21):
    name = "tmd"
    is_wan = adds_layers = True
    presets = PRESETS
    known_by = "has a flow head with inner steps"
    products = rf"{Wan21.products}|fusion\.(ffn\.[02]|linear)"
    fusion = "gated"

    def samplings(self, sampler: Any) -> list[tuple[int, int]]:
        """All that the student is made for."""
        return list(product(sampler.allowed_steps, sampler.allowed_inner_steps))

    def builders(self) -> dict[str, Builder]:
        from ..graphs.tmd import backbone, flow_head

        return {**super().builders(), "backbone": backbone, "flow_head": flow_head}


TMD = _Tmd()
