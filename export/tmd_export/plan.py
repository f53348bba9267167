"""Which graphs an export makes, in which precision; refused here is what an export refuses before any work."""

from __future__ import annotations

from .errors import ExportError
from .families import FAMILIES
from .families.build import sections
from .parts import QUANTIZED, SECOND_PARTS, ordered, parse_precision
from .sources.source import Source


def planned(
    source: Source, parts: tuple[str, ...] | None, precision: str, text_encoder_weights: str | None = None
) -> dict[str, str]:
    """Part -> precision, in the order of a run, without `update`; arguments as of `export.export_bundle`.

    Raises ExportError for a part that the model does not have, that there are no weights for, or that cannot have its
    precision; ValueError for an unknown part or precision.
    """
    chosen = ordered(source.default_parts if parts is None else parts)
    family, model = FAMILIES[source.family], sections(source).model
    precisions = {part: parse_precision(precision)[part] for part in chosen}
    for part, wanted in precisions.items():
        if wanted in QUANTIZED and not family.has_products(part, model):
            precisions[part] = "bf16"
    if text_encoder_weights not in (None, "int8"):
        raise ValueError(f"weights of the text encoder cannot be stored as {text_encoder_weights!r}: choose int8.")
    if text_encoder_weights and "text_encoder" in precisions:
        precisions["text_encoder"] = f"{text_encoder_weights}-weights"
    foreign = [part for part in chosen if part not in source.parts]
    if foreign:
        raise ExportError(
            f"{source.model} has no graph {foreign[0]} (only a model that takes a picture has an encoder, and "
            f"not with a --decoder; one of stills has no later frame): choose among {', '.join(source.parts)}."
        )
    if set(SECOND_PARTS) & set(source.parts) and set(QUANTIZED) & {
        precisions[part] for part in precisions if not part.startswith("decoder")
    }:
        raise ExportError(
            f"{source.model} has two transformers, which cannot be calibrated yet: choose --precision bf16, fp16 "
            "or fp32."
        )
    source.check(chosen)
    return precisions
