"""Students of Transition Matching Distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import Preset
from .wan import VIDEO_480P

if TYPE_CHECKING:
    from tmd_ref.student import TimeGrids

PRESETS: Mapping[str, Preset] = {
    # What the built-in student is trained for, and what TMD reports for Wan.
    "tmd": Preset(
        "a TMD student",
        {
            "rule": "euler",
            "steps": 2,
            "inner_steps": 2,
            "allowed_steps": [1, 2, 3, 4],
            "allowed_inner_steps": [1, 2, 4],
            "shift": 10.0,
            "inner_shift": 10.0,
            "t_max": 0.999,
        },
        VIDEO_480P,
    ),
}


def student_sampler(grids: TimeGrids) -> dict[str, Any]:
    """The manifest's `sampler` of a TMD student: that of the paper, with the steps and shifts it was distilled for."""
    base = PRESETS["tmd"].sampler
    return {
        **base,
        "steps": grids.outer_steps,
        "inner_steps": grids.inner_steps,
        "allowed_steps": sorted({*base["allowed_steps"], grids.outer_steps}),
        "allowed_inner_steps": sorted({*base["allowed_inner_steps"], grids.inner_steps}),
        "shift": float(grids.outer_shift),
        "inner_shift": float(grids.inner_shift),
    }
