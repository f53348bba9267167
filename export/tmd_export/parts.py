"""Names of the graphs of a bundle and of the models they come from; without torch, for the command line's help."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = ("encoder", "text_encoder", "backbone", "flow_head", "decoder_first", "decoder_step")
"""The graphs of a bundle, in the order in which a run uses them."""

UPDATE = "update"
"""The graph that every bundle with a flow head has beside it. It has no weights and is always fp32."""

VIDEO_PARTS = PARTS[1:]
"""Those of a model of videos, which has no run that starts from a picture."""

MODEL_OF = {
    "encoder": "vae",
    "text_encoder": "text_encoder",
    "backbone": "student",
    "flow_head": "student",
    "decoder_first": "vae",
    "decoder_step": "vae",
}
"""Part -> the model that it is cut from."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "nvfp4")
"""What the large products of a graph can be computed in."""

QUANTIZED = ("int8", "fp8", "nvfp4")
"""Precisions that need a calibration; `backbone` and `flow_head` can have them."""


def ordered(parts: Iterable[str]) -> tuple[str, ...]:
    """`parts` without repeats, in the order of `PARTS`. Raises ValueError for an unknown or no name."""
    wanted = list(parts)
    unknown = [part for part in wanted if part not in PARTS]
    if unknown or not wanted:
        problem = f"there is no part {unknown[0]!r}" if unknown else "no part is named"
        raise ValueError(f"{problem}: choose among {', '.join(PARTS)}.")
    return tuple(part for part in PARTS if part in wanted)


def parse_precision(text: str) -> dict[str, str]:
    """Part -> precision for every part of `PARTS`, from "bf16" or "bf16,decoder=fp16,text_encoder=fp32".

    A precision alone is for all parts that are not named; "decoder" names both decoders. Without one, those parts stay
    fp32. Residual sums of UMT5 leave float16's range: "fp16" alone gives the text encoder bf16. "int8", "fp8" and
    "nvfp4" alone give bf16 to what they are not for. The encoder, which runs once, is fp32 unless it is named. Raises
    ValueError.
    """
    default, named = "fp32", dict[str, str]()
    for item in filter(None, (item.strip() for item in text.split(","))):
        part, equals, precision = (piece.strip() for piece in item.rpartition("="))
        if precision not in PRECISIONS:
            raise ValueError(f"there is no precision {precision!r}: choose among {', '.join(PRECISIONS)}.")
        members = [name for name in PARTS if part in (name, name.partition("_")[0])]
        if equals and (not members or part == "flow"):
            raise ValueError(f"there is no part {part!r}: choose among {', '.join(PARTS)}.")
        if not equals:
            default = precision
        named |= dict.fromkeys(members, precision)
    if named.get("text_encoder") == "fp16":
        raise ValueError("values of the text encoder leave float16's range: choose bf16 or fp32 for it.")
    named.setdefault("encoder", "fp32")
    for name, precision in named.items():
        if precision in QUANTIZED and MODEL_OF[name] != "student":
            raise ValueError(f"{name} cannot be {precision}, only backbone and flow_head: choose bf16 for it.")
    chosen = dict.fromkeys(PARTS, default)
    if default in QUANTIZED:
        chosen |= {name: "bf16" for name in PARTS if MODEL_OF[name] != "student"}
    if default == "fp16":
        chosen["text_encoder"] = "bf16"
    return chosen | named
