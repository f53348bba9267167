"""How the reference in torch samples each family: the one thing that a contest does differently for one and another.

What a run of ours may ask of a bundle, its `manifest.family` says; where random weights come from, tmd_export knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .spec import Work


def _tmd(module: Any, noise: Any, embeds: Any, work: Work) -> None:
    from tmd_ref.samplers import tmd_sample

    tmd_sample(module, noise, embeds, work.steps, work.inner_steps)


def _wan(module: Any, noise: Any, embeds: Any, work: Work) -> None:
    from tmd_ref.samplers import euler_sample

    euler_sample(module, noise, embeds, None, work.steps, guidance=1.0)


REFERENCE: dict[str, Callable[[Any, Any, Any, Work], None]] = {"tmd": _tmd, "wan": _wan}
"""`model.family` -> samples `module` from noise `[1, C, T, h, w]` and embeddings `[1, S, E]`, as the work says."""


def default_preset(family: str, model: str | None) -> str | None:
    """The preset of tmd-export that tells the family of a model with random weights; None: it can be of one only."""
    from tmd_export.families import FAMILIES

    if all(name == family or model not in other.models for name, other in FAMILIES.items()):
        return None
    return next(iter(FAMILIES[family].presets))
