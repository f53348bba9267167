"""What is calibrated on when nothing is given, and what results are compared on: prompts that are not the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tmd_ref.captions import caption
from tmd_ref.scenes import sample_scene

from ..errors import ExportError

MAX_PROMPTS = 256
_SCENES, _HELD_OUT_SCENES = 8, 2

_GENERAL = (
    "A golden retriever runs along a beach at sunset, waves breaking behind it, shallow depth of field",
    "Close-up of an old watchmaker's hands placing a tiny gear under warm lamp light",
    "Aerial view of a winding river through an autumn forest, slow camera movement, morning fog",
    "A crowded night market in the rain, neon reflections on wet stone, people with umbrellas walk by",
    "An animated fox in a green scarf jumps from stone to stone across a mountain stream",
    "A glass of water falls from a table and shatters on a white floor, slow motion",
    "Time lapse of clouds over a snow-covered mountain ridge, stars appear as it gets dark",
    "A red sports car drifts around a corner on a desert road, dust in the air, tracking shot",
)
_HELD_OUT_GENERAL = (
    "A barista pours milk into a cup of coffee and draws a leaf, seen from above",
    "Two sailing boats race on a blue sea under a strong wind, spray and bright sun",
)


def default_prompts(built_in: bool, held_out: bool = False) -> tuple[str, ...]:
    """Captions of scenes for the built-in models, which know nothing else, and of ordinary videos for all others."""
    if not built_in:
        return _HELD_OUT_GENERAL if held_out else _GENERAL
    rng = np.random.default_rng(0)
    count = _HELD_OUT_SCENES if held_out else _SCENES
    return tuple(caption(sample_scene(rng, held_out), rng) for _ in range(count))


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty. Raises ExportError for none, too many, or something else."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}. Check --calibration.") from None
    except UnicodeDecodeError:
        raise ExportError(f"{path} is not UTF-8 text: --calibration takes one prompt per line, or a .json.") from None
    prompts = tuple(line for line in lines if line)
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ExportError(f"{path} has {len(prompts)} prompts: give 1 to {MAX_PROMPTS}, one per line.")
    return prompts
