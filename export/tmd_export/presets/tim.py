"""Transition Models."""

from __future__ import annotations

from collections.abc import Mapping

from . import Preset

PRESETS: Mapping[str, Preset] = {
    # WZDTHU/TiM, scripts of GenEval and DPG-Bench: uniform times from 1 to 0; guidance strictly inside of (0, 1), so
    # that the first step goes without.
    "tim": Preset(
        "a Transition Model, any number of steps",
        {"rule": "flow_map", "steps": 4, "guidance": 2.5, "guidance_interval": [0.0, 1.0], "negative_prompt": None},
        {"frames": 1, "width": 1024, "height": 1024, "fps": 1},
    ),
}
