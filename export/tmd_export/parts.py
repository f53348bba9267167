"""Names of the graphs of a bundle and of the models they come from; without torch, for the command line's help."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = ("text_encoder", "backbone", "flow_head", "decoder_first", "decoder_step")
"""The graphs of a bundle, in the order in which a run uses them."""

MODEL_OF = {
    "text_encoder": "text_encoder",
    "backbone": "student",
    "flow_head": "student",
    "decoder_first": "vae",
    "decoder_step": "vae",
}
"""Part -> the model that it is cut from."""

MODELS = ("tiny", "wan1.3b", "wan14b")
"""What `--model` can be."""


def ordered(parts: Iterable[str]) -> tuple[str, ...]:
    """`parts` without repeats, in the order of `PARTS`. Raises ValueError for an unknown or no name."""
    wanted = list(parts)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        problem = f"there is no part {unknown[0]!r}" if unknown else "no part is named"
        raise ValueError(f"{problem}: choose among {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in wanted)
