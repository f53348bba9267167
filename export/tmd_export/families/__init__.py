"""The families of models, as an export speaks of them: where their weights come from, which modules make their graphs,
how their checkpoints are sampled, what stays in float32 and how they are calibrated. One module per family; no other
part of the export knows one by its name.

What a family's graphs take and give, and what its manifest says, is in `tmd_engines.bundle.families`. No torch is
imported here: the command line reads the names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import ExportError
from ..presets import Preset
from .anyflow import ANYFLOW
from .family import GRIDS, ExportFamily, Request
from .tim import TIM
from .tmd import TMD
from .wan import WAN

if TYPE_CHECKING:
    from ..sources.source import Source

FAMILIES: dict[str, ExportFamily] = {family.name: family for family in (TMD, WAN, ANYFLOW, TIM)}
"""`model.family` of a manifest -> the family. A new one is added here, or put in by a program of its own."""

__all__ = [
    "FAMILIES",
    "GRIDS",
    "ExportFamily",
    "Request",
    "built_in",
    "find_preset",
    "models",
    "presets",
    "sampling_of",
]


def models() -> tuple[str, ...]:
    """What `--model` can be."""
    return tuple(dict.fromkeys(model for family in FAMILIES.values() for model in family.models))


def built_in() -> frozenset[str]:
    """The models whose weights come with the package."""
    return frozenset(model for family in FAMILIES.values() for model in family.built_in)


def presets() -> dict[str, Preset]:
    """The presets of all families, by their names."""
    return {name: preset for family in FAMILIES.values() for name, preset in family.presets.items()}


def find_preset(family: ExportFamily, name: str | None = None, architecture: str | None = None) -> Preset:
    """The preset `name`, or the default of `family` if None, for a model of `architecture` (None: of any).

    Raises ExportError if it is for another family, or for another architecture.
    """
    fitting = {
        called: preset
        for called, preset in family.presets.items()
        if architecture is None or preset.architecture in (None, architecture)
    }
    if name is None:
        return next(iter(fitting.values()))
    if name in fitting:
        return fitting[name]
    known = presets()
    if name not in known:
        raise ExportError(f"there is no preset {name!r}: choose one of {', '.join(known)}.")
    why = f"is of the architecture {architecture}" if name in family.presets else family.known_by
    raise ExportError(
        f"the preset {name} is for {known[name].about}, and this checkpoint {why}: choose among {', '.join(fitting)}."
    )


def sampling_of(source: Source, preset: str | None = None, grid: str | None = None) -> Preset:
    """How the model of `source` is sampled: as `preset` says, else as the source says itself, else as its family
    usually is; on the time grid `grid`, one of `GRIDS` (None: the model's own times). Raises ExportError."""
    family = FAMILIES[source.family]
    sampling = find_preset(family, preset, source.model_entry()["architecture"])
    if preset is None and source.sampler is not None:
        sampling = replace(sampling, sampler=source.sampler)
    if grid is not None:
        sampling = replace(sampling, sampler=family.on_grid(sampling.sampler, grid))
    return replace(sampling, sampler=source.completed(sampling.sampler))
