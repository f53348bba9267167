"""From noise to latents: the settings and the loop of every family, and the noise, grids and tables that they share.

One module per family (`tmd`, `wan`, `anyflow`, and `tim` with `tim_settings`); nothing else in the runtime knows one by
its name.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..errors import RuntimeFailure, UsageFailure
from ..settings import Wishes, check_types
from .anyflow import ANYFLOW
from .family import Denoised, Loop, RuntimeFamily
from .tim import TIM
from .tmd import TMD
from .wan import WAN

if TYPE_CHECKING:
    from typing import Unpack

    from tmd_engines import Manifest

    from ..settings import MoreWishes, Settings

SAMPLING: dict[str, RuntimeFamily] = {family.name: family for family in (TMD, WAN, ANYFLOW, TIM)}
"""`model.family` of a manifest -> how the runtime samples it. A program may add a family of its own."""

__all__ = ["SAMPLING", "Denoised", "Loop", "RuntimeFamily", "family_of", "resolve_settings"]


def family_of(manifest: Manifest) -> RuntimeFamily:
    """How a bundle's model is sampled. Raises RuntimeFailure for a family that can be read but not sampled."""
    name = manifest.model.family
    if name not in SAMPLING:
        raise RuntimeFailure(
            f"this version of tmd cannot sample models of the family {name}, only {', '.join(SAMPLING)}: use the "
            "version that made the bundle."
        )
    return SAMPLING[name]


def resolve_settings(
    manifest: Manifest,
    seed: int | None = None,
    steps: int | None = None,
    inner_steps: int | None = None,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    **more: Unpack[MoreWishes],
) -> Settings:
    """The settings of a run with these wishes (`Wishes`). Raises UsageFailure that says what the bundle allows."""
    known = [field.name for field in fields(Wishes)]
    unknown = [name for name in more if name not in known]
    if unknown:
        raise UsageFailure(
            f"pipeline() and pipeline.settings() have no argument {unknown[0]!r}: a run has {', '.join(known)}, where "
            "size is (width, height)."
        )
    wishes = Wishes(seed, steps, inner_steps, frames, size, **more)
    check_types(wishes)
    return family_of(manifest).settings(manifest, wishes)
