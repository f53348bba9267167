"""Relatives of Wan's text-to-video models that are published in the same form and are not what the graphs compute.

Each is refused with its family and the tensor that gave it away, because its weights would load and show noise. What
cannot be told: CausVid's and Self-Forcing's autoregressive checkpoints have exactly the tensors of a bidirectional one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from tmd_engines.errors import quote

from .mapped import Entry


class Stranger(NamedTuple):
    """`sign`: pattern of a tensor's name; `name` and `reason` end up in "this is NAME: REASON"."""

    sign: str
    name: str
    reason: str


_SPARSE = "its attention skips tokens, and with the dense attention of these graphs it shows noise"
_ROUNDED = (
    "this way to store weights is not known here; take the file of the same model in float32, float16, bfloat16, or in "
    "a format that docs/wan.md lists"
)

STRANGERS = (
    Stranger(r"(^|\.)proj_l\.", "TurboDiffusion's sparse-linear attention (SLA)", _SPARSE),
    Stranger(r"\.to_gate_compress\.", "FastWan's video sparse attention (VSA)", f"{_SPARSE}. FastWan-QAD is dense"),
    Stranger(r"^far_patch_embedding\.", "AnyFlow-FAR", "it goes chunk by chunk; take the AnyFlow that does not (T2V)"),
    Stranger(r"^vace_", "VACE", "it edits videos and needs one as input; take the text-to-video model"),
    Stranger(
        r"^img_emb\.|\.image_embedder\.|\.(k_img|v_img|norm_k_img|add_k_proj|add_v_proj|norm_added_k)\.",
        "an image-to-video model",
        "it needs an image as input; take the text-to-video model",
    ),
    Stranger(r"^(motion_encoder|face_adapter|pose_patch_embedding)\.", "Wan-Animate", "take the text-to-video model"),
    Stranger(r"^decoder\.\d+\.", "a TAEHV decoder", "give it as --decoder, beside the --checkpoint of the transformer"),
    Stranger(
        r"\.lora_(A|B|up|down)\b|\.diff(_b)?$",
        "a LoRA",
        "it holds only differences to a model; give it as --lora, beside the --checkpoint of that model",
    ),
    Stranger(
        r"\.lokr_\w+$",
        "a LoKr",
        "it holds only differences to a model, as Kronecker products; merge it into that model first",
    ),
    Stranger(
        r"\.hada_\w+$",
        "a LoHa",
        "it holds only differences to a model, as Hadamard products; merge it into that model first",
    ),
    Stranger(
        r"^(first_stage_model|cond_stage_model|conditioner|text_encoders?|vae)\.",
        "an all-in-one file",
        "transformer, VAE and text encoder lie in it together; give each part as a file of its own",
    ),
    Stranger(r"(^|\.)(input|weight)_global_scale$", "a model quantised to NVFP4 as LightX2V does it", _ROUNDED),
    Stranger(r"(^|\.)int8_weight$", "a model with int8 linear layers", _ROUNDED),
)

_ROUNDED_TO = {
    "int8": "a model with int8 linear layers",
    "uint8": "a model quantised to NVFP4 or another packed type",
    "uint32": "a model quantised to a packed type",
    "F4": "a model quantised to NVFP4",
}

IMAGE_CHANNELS = 36  # of latents, a mask and the latents of an image


def stranger(entries: Mapping[str, Entry]) -> str | None:
    """The family of a foreign model with the sign of it, as "NAME (SIGN): REASON"; None for none that is known.

    `entries`: by bare name.
    """
    for family in STRANGERS:
        found = next((name for name in entries if re.search(family.sign, name)), None)
        if found is not None:
            return f"{family.name} ({quote(found)} is in it): {family.reason}"
    patch = entries.get("patch_embedding.weight")
    if patch is not None and len(patch.shape) in (2, 5):
        channels = patch.shape[1] if len(patch.shape) == 5 else patch.shape[1] // 4
        if channels == IMAGE_CHANNELS:
            return (
                f"an image-to-video model ('patch_embedding.weight' takes {channels} channels): it needs an image as "
                "input; take the text-to-video model"
            )
    for name, entry in entries.items():
        if entry.dtype in _ROUNDED_TO and name.endswith(".weight"):
            scale = next((key for key in (f"{name}_scale", f"{name}_scale_inv") if key in entries), None)
            scaled = f" with scales like {quote(scale)}" if scale else ""
            return f"{_ROUNDED_TO[entry.dtype]} ({quote(name)} is {entry.dtype}{scaled}): {_ROUNDED}"
    return None
