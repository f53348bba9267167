"""What the user says of a LoRA: its file and its strength. No torch here: the command line reads this."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple

from tmd_engines.bundle.sections import MAX_STRENGTH
from tmd_engines.errors import quote

_NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)", re.ASCII | re.IGNORECASE)


class LoraFile(NamedTuple):
    """A file with a LoRA, or PEFT's or diffusers' folder of one, and the factor that it is added with."""

    path: Path
    strength: float = 1.0


def parse_lora(text: str) -> LoraFile:
    """`FILE` or `FILE=STRENGTH`; the strength is what follows the last "=", if that is a number.

    So a path may hold "=", and one that itself ends in "=" and a number is written with a strength behind it.
    Raises ValueError for a strength that cannot be used.
    """
    path, equals, number = text.rpartition("=")
    if not equals or not _NUMBER.fullmatch(number):
        return LoraFile(Path(text))
    return LoraFile(Path(path), checked_strength(float(number), path))


def checked_strength(strength: float, path: str | Path) -> float:
    """Raises ValueError for a strength that is not a finite number within the manifest's bounds."""
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not math.isfinite(strength) or abs(strength) > MAX_STRENGTH:
        raise ValueError(
            f"the strength {quote(str(strength))} of the LoRA {quote(str(path))} is not a number from "
            f"-{MAX_STRENGTH:g} to {MAX_STRENGTH:g}: write FILE=0.5, for instance."
        )
    return float(strength)
