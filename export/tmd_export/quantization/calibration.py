"""`calibration.json`: the ranges of activations that were measured on one checkpoint, and what each layer does to it.

A file of the bundle beside the manifest, and an input of the next export of the same checkpoint.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import ExportError
from ..sources.source import Source

FILE = "calibration.json"
FORMAT: Literal["tmd-calibration-2"] = "tmd-calibration-2"
MAX_BYTES = 16 << 20
QUANTIZABLE = ("backbone", "flow_head")

Size = Annotated[float, Field(ge=0.0, lt=math.inf)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Sensitivity(_Part):
    """Relative L2 errors of a graph's result: with every layer quantized, with all but `kept`, and each layer's part.

    The squares of the parts add up to that of `everything`. `layers` is empty where they were not measured. `kept` are
    the layers that stay in high precision.
    """

    everything: Size
    chosen: Size
    layers: dict[str, Size]
    kept: tuple[str, ...]


class Calibration(_Part):
    """`checkpoint`: file -> sha256 of what it was measured on (or "origin", of weights from a seed).

    `ranges`: graph -> name of an activation (`Layer.operands`) -> largest absolute value. `sensitivity`: precision ->
    graph. The rest says what was run: `prompts`, latent `(frames, height, width)`, pairs of steps and inner steps.
    """

    format: Literal["tmd-calibration-2"]
    checkpoint: dict[str, str]
    prompts: tuple[str, ...]
    latents: tuple[int, int, int]
    steps: tuple[tuple[int, int], ...]
    ranges: dict[str, dict[str, Size]]
    sensitivity: dict[str, dict[str, Sensitivity]]


def read_calibration(path: Path) -> Calibration:
    """Raises ExportError if `path` holds something else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ExportError(f"{path} is larger than {MAX_BYTES >> 20} MiB: it is no calibration of tmd-export.")
        return Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}. Check --calibration.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        problem = f"{place}: {first['msg']}"
        if place == "format" and isinstance(first["input"], str):
            problem = f"its format is {first['input']}, and {FORMAT} is read"
        raise ExportError(
            f"{path} is no calibration of this version of tmd-export: {problem}. Make a new one: run the same "
            "tmd-export command without --calibration."
        ) from None


def identity(source: Source) -> dict[str, str]:
    """What a calibration is bound to: the files of the two graphs and their sha256, or the seed, and the LoRAs."""
    added = [lora for lora in source.loras() if lora["strength"] != 0]
    return (source.sha256(QUANTIZABLE) or {"origin": source.origin}) | {
        f"LoRA {number}, {lora['file']} at {lora['strength']!r}": lora["sha256"] for number, lora in enumerate(added, 1)
    }


def check_identity(calibration: Calibration, found: dict[str, str], where: str) -> None:
    """Raises ExportError if `calibration` was measured on other weights than those `found`."""
    if calibration.checkpoint == found:
        return
    have, want = (
        ", ".join(f"{name} {value[:12]}" for name, value in known.items()) for known in (calibration.checkpoint, found)
    )
    raise ExportError(
        f"{where} was measured on another checkpoint ({have}) than this one ({want}): its ranges say nothing about "
        "these weights. Leave --calibration out to calibrate anew."
    )
