"""The families of models, as a bundle speaks of them: what their manifest says, what their graphs take and give, what a
run of theirs costs. One module per family; nothing else in this part knows one by its name.

What is not here: how a family is exported (`tmd_export.families`) and how it is sampled (`tmd_runtime.sampling`).
"""

from __future__ import annotations

from .anyflow import ANYFLOW
from .family import Calls, Family
from .tim import TIM
from .tmd import TMD
from .wan import WAN

FAMILIES: dict[str, Family] = {family.name: family for family in (TMD, WAN, ANYFLOW, TIM)}
"""`model.family` of a manifest -> the family. A new one is added here, or put in by a program of its own."""

__all__ = ["FAMILIES", "Calls", "Family"]
