"""What the samplings of a calibration start from besides prompts, as the manifest in the making says: sizes of latents,
rotary tables, and the conditions of models that read no prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tmd_ref.tim.model import rope_tables as tim_tables
from tmd_ref.wan import rope_tables as wan_tables

MAX_TOKENS = 256  # of latents to calibrate on; larger default ones are replaced by SMALL_LATENTS or SMALL_STILL patches
SMALL_LATENTS = (2, 20, 20)  # frames, height, width
SMALL_STILL = (1, 16, 16)

Document = Mapping[str, Any]


def latent_size(document: Document) -> tuple[int, int, int]:
    """Frames, height and width of the latents that are sampled: the default ones if they are small enough."""
    video, latents, patch = document["video"], document["latents"], document["model"]["patch_size"]
    height, width = (video[side] // latents["spatial_stride"] for side in ("height", "width"))
    size = (1 + (video["frames"] - 1) // latents["temporal_stride"], height, width)
    if np.prod(size) <= MAX_TOKENS * np.prod(patch):
        return size
    if document["model"]["family"] != "tim":
        return SMALL_LATENTS
    frames, height, width = (count * side for count, side in zip(SMALL_STILL, patch, strict=True))
    return frames, height, width


def rope(document: Document, size: tuple[int, ...]) -> dict[str, np.ndarray]:
    """rope_cos and rope_sin for latents of `size` (frames, height, width)."""
    model = document["model"]
    t, h, w = (side // patch for side, patch in zip(size, model["patch_size"], strict=True))
    if model["family"] == "tim":
        cos, sin = tim_tables(h, w, model["head_dim"], rope=model["rope"])
    else:
        cos, sin = wan_tables(t, h, w, model["head_dim"])
    return {"rope_cos": cos.numpy(), "rope_sin": sin.numpy()}


def unread(document: Document, count: int, rng: np.random.Generator) -> np.ndarray:
    """Conditions without a text encoder, and one more for none: classes int64 `[count + 1]`, or, for weights from a
    seed, to which words are noise like any other, float32 `[count + 1, text, E]`."""
    classes, text = document["model"].get("classes"), document["text"]
    if classes is not None:
        return np.append(rng.integers(0, classes, count), classes)
    return rng.standard_normal((count + 1, text["max_length"], text["dim"]), np.float32)
