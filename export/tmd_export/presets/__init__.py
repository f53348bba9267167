"""How published checkpoints want to be sampled: times, what the network is told of them, update rule, guidance.

The figures come from the authors' own inference code, named beside each. One module per family; which presets a family
has, and which is its default, `families` says. No torch here: the command line reads the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`sampler` as the manifest holds it; `video` is the default output; `about` names the checkpoints.

    `architecture` is the manifest's of the models that can be sampled so; None: all of the family.
    """

    about: str
    sampler: Mapping[str, Any]
    video: Mapping[str, int]
    architecture: str | None = None
