"""Flow maps of AnyFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import Preset
from .wan import VIDEO_480P

PRESETS: Mapping[str, Preset] = {
    # NVlabs/AnyFlow, README: 4 steps, shift 5, guidance learned by the weights.
    "anyflow": Preset(
        "a flow map of AnyFlow, any number of steps",
        {"rule": "euler", "steps": 4, "shift": 5.0, "guidance": 1.0, "negative_prompt": None},
        VIDEO_480P,
    ),
}


def scheduled_flow_map(shift: float | None) -> dict[str, Any]:
    """The manifest's `sampler`, with the shift that a folder's scheduler says (None: the usual one)."""
    base = PRESETS["anyflow"].sampler
    return {**base, "shift": base["shift"] if shift is None else shift}
