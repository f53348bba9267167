"""The transformer of a Wan in one safetensors file under its authors' names, for `tmd-distill` and other programs.

It is what an export would cut in two, so LoRAs are merged, and weights that were stored in fewer bits are dequantised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from tmd_engines import unfinished

from .errors import ExportError
from .families import FAMILIES
from .sources.source import Source

_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def names_of(source: Source) -> dict[str, str]:
    """Original name -> name in `source.module("student")`, for every weight but those of a student's own layers.

    Raises ExportError for a source that holds no transformer of Wan alone.
    """
    if not FAMILIES[source.family].is_wan or "backbone_2" in source.parts:
        raise ExportError(f"{source.model} is not one transformer of Wan: its weights have no file of that kind.")
    return {
        source.published_names(name)[0]: name
        for name, _ in source.module("student").named_parameters()
        if not name.startswith(("head.interval_", "head.fusion."))
    }


def write_transformer(source: Source, path: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the transformer, whole or not at all, one weight in memory at a time.

    `dtype`: that of the file (None: float32 and the 16-bit types as they are stored). A student's transformer is
    written without the layers that its flow head alone has. Raises ExportError if the source has no transformer of
    Wan, or if `path` cannot be written.
    """
    names = names_of(source)
    shapes = {name: parameter.shape for name, parameter in source.module("student").named_parameters()}
    try:
        with unfinished.replacing(path.absolute()) as made, open(made, "wb") as file:
            _write(file, source, {name: (own, shapes[own]) for name, own in names.items()}, dtype)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error}. Nothing was.") from error


def _write(
    file: BinaryIO, source: Source, weights: Mapping[str, tuple[str, torch.Size]], dtype: torch.dtype | None
) -> None:
    """The format of safetensors: the size of a JSON header in 8 bytes, the header, the weights one after the other.

    Which types they have is known when they are read, so the header is written twice, in the room of the longest.
    """
    longest = {name: torch.float32 for name in weights}
    room = len(_header(weights, longest, "BF16"))
    file.write(room.to_bytes(8, "little") + b" " * room)
    types: dict[str, torch.dtype] = {}
    for name, (own, _) in weights.items():
        weight = source.tensor("student", own)
        types[name] = dtype or (weight.dtype if weight.dtype in _TYPES else torch.float32)
        file.write(weight.to(types[name]).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    file.seek(8)
    file.write(_header(weights, types).ljust(room))


def _header(
    weights: Mapping[str, tuple[str, torch.Size]], types: Mapping[str, torch.dtype], word: str | None = None
) -> bytes:
    """`word`: in the place of every type's."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (_, shape) in weights.items():
        end = at + shape.numel() * types[name].itemsize
        entries[name] = {"dtype": word or _TYPES[types[name]], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return json.dumps(entries, separators=(",", ":")).encode()
