"""Names of the graphs of a bundle and of the models they come from; without torch, for the command line's help."""

from __future__ import annotations

from collections.abc import Iterable

PARTS = ("encoder", "text_encoder", "backbone", "flow_head", "decoder_first", "decoder_step")
"""The graphs of a bundle, in the order in which a run uses them."""

DECODERS = PARTS[-2:]

UPDATE = "update"
"""The graph that every bundle with a flow head has beside it. It has no weights and is always fp32."""

VIDEO_PARTS = PARTS[1:]
"""Those of a model of videos, which has no run that starts from a picture."""

SECOND_PARTS = ("backbone_2", "flow_head_2")
"""Those of the second transformer of a model that has two (Wan2.2-A14B)."""

TWO_TRANSFORMERS = (*PARTS[1:4], *SECOND_PARTS, *PARTS[4:])
"""Those of such a model."""

_ORDER = (*PARTS[:1], *TWO_TRANSFORMERS)

MODEL_OF = {
    "encoder": "vae",
    "text_encoder": "text_encoder",
    "backbone": "student",
    "flow_head": "student",
    "backbone_2": "student_2",
    "flow_head_2": "student_2",
    "decoder_first": "vae",
    "decoder_step": "vae",
}
"""Part -> the model that it is cut from."""

_DENOISERS = ("student", "student_2")

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "nvfp4")
"""What the large products of a graph can be computed in."""

QUANTIZED = ("int8", "fp8", "nvfp4")
"""Precisions that need a calibration; `backbone` and `flow_head` can have them, and the decoders of videos int8."""

_CONVOLUTIONS = {"decoder_first": ("int8",), "decoder_step": ("int8",)}


def ordered(parts: Iterable[str]) -> tuple[str, ...]:
    """`parts` without repeats, in the order of a run. Raises ValueError for an unknown or no name."""
    wanted = list(parts)
    unknown = [part for part in wanted if part not in _ORDER]
    if unknown or not wanted:
        problem = f"there is no part {unknown[0]!r}" if unknown else "no part is named"
        raise ValueError(f"{problem}: choose among {', '.join(PARTS)}.")
    return tuple(part for part in _ORDER if part in wanted)


def parse_precision(text: str) -> dict[str, str]:
    """Part -> precision for every part, from "bf16" or "bf16,decoder=fp16,text_encoder=fp32".

    A precision alone is for all parts that are not named; "decoder" names both decoders, "backbone" and "flow_head"
    those of both transformers. Without one, those parts stay fp32. Residual sums of UMT5 leave float16's range: "fp16"
    alone gives the text encoder bf16. "int8", "fp8" and "nvfp4" alone give bf16 to all but the denoiser; decoders are
    int8 only where they are named. The encoder, which runs once, is fp32 unless it is named. Both decoders are fp32 or
    neither is. Raises ValueError.
    """
    default, named = "fp32", dict[str, str]()
    for item in filter(None, (item.strip() for item in text.split(","))):
        part, equals, precision = (piece.strip() for piece in item.rpartition("="))
        if precision not in PRECISIONS:
            raise ValueError(f"there is no precision {precision!r}: choose among {', '.join(PRECISIONS)}.")
        members = [name for name in _ORDER if part in (name, name.removesuffix("_2"), name.partition("_")[0])]
        if equals and (not members or part == "flow"):
            raise ValueError(f"there is no part {part!r}: choose among {', '.join(PARTS)}.")
        if not equals:
            default = precision
        named |= dict.fromkeys(members, precision)
    if named.get("text_encoder") == "fp16":
        raise ValueError("values of the text encoder leave float16's range: choose bf16 or fp32 for it.")
    named.setdefault("encoder", "fp32")
    for name, precision in named.items():
        if precision in QUANTIZED and MODEL_OF[name] not in _DENOISERS and precision not in _CONVOLUTIONS.get(name, ()):
            others = "int8 or bf16" if name in _CONVOLUTIONS else "bf16"
            raise ValueError(f"{name} cannot be {precision}, only backbone and flow_head: choose {others} for it.")
    chosen = dict.fromkeys(_ORDER, default)
    if default in QUANTIZED:
        chosen |= {name: "bf16" for name in _ORDER if MODEL_OF[name] not in _DENOISERS}
    if default == "fp16":
        chosen["text_encoder"] = "bf16"
    chosen |= named
    first, step = chosen["decoder_first"], chosen["decoder_step"]
    if "fp32" in (first, step) and first != step:
        raise ValueError(
            f"decoder_first is {first} and decoder_step {step}, and caches go from one to the other, in 16 bits unless "
            "both are fp32: choose one precision for both, as in decoder=bf16."
        )
    return chosen
