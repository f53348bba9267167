"""The manifest of a bundle, schema version 2, as types.

`parse_manifest` turns untrusted bytes into a `Manifest` or a `BundleError`, and nothing else. The models are strict (no
number from a string, no bool for an int, no unknown field) and frozen. What needs the files is in `reader.py`, what a
family says in `families`. The same schema for people is `docs/bundle.md`; change both together.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, create_model, model_validator

from ..errors import BundleError, quote
from .families import FAMILIES, Family
from .fields import MANIFEST_NAME, FileName, Identifier, Part
from .sections import (
    Accuracy,
    FileInfo,
    GraphInfo,
    LatentInfo,
    ModelInfo,
    Provenance,
    SamplerInfo,
    TensorSpec,
    VideoInfo,
)  # fmt: skip
from .strict_json import read_json
from .text import DrawsInfo, EmbeddingTable, TextInfo

__all__ = [
    "MANIFEST_NAME", "MAX_MANIFEST_BYTES", "SCHEMA_VERSION", "Accuracy", "DrawsInfo", "EmbeddingTable", "FileInfo",
    "GraphInfo", "LatentInfo", "Manifest", "ModelInfo", "Provenance", "SamplerInfo", "TensorSpec", "TextInfo",
    "VideoInfo", "parse_manifest",
]  # fmt: skip

SCHEMA_VERSION = 2
MAX_MANIFEST_BYTES = (
    1 << 20
)  # the built-in model's manifest is about 25 kB; one with 32 caches per graph stays below 100 kB
MAX_GRAPHS = 32
MAX_FILES = 128


class Manifest(Part):
    """`manifest.json` of a bundle. Every file of the bundle but the manifest itself stands in `files`."""

    schema_version: Literal[2]
    model: ModelInfo
    sampler: SamplerInfo
    latents: LatentInfo
    video: VideoInfo
    text: TextInfo
    draws: DrawsInfo | None = None
    graphs: Annotated[dict[Identifier, GraphInfo], Field(min_length=1, max_length=MAX_GRAPHS)]
    files: Annotated[dict[FileName, FileInfo], Field(min_length=1, max_length=MAX_FILES)]
    provenance: Provenance

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({name.lower() for name in self.files}) != len(self.files):
            raise ValueError("two names in files differ only in case, and some file systems cannot tell them apart")
        owners: dict[str, str] = {}
        for name, graph in self.graphs.items():
            for file in filter(None, (graph.file, graph.data)):
                if file not in self.files:
                    raise ValueError(f"graph {quote(name)} needs {quote(file)}, which is not in files")
                if owners.setdefault(file, name) != name:
                    raise ValueError(f"graphs {quote(owners[file])} and {quote(name)} share {quote(file)}")
        if self.text.tokenizer is not None and self.text.tokenizer not in self.files:
            raise ValueError(f"text.tokenizer is {quote(self.text.tokenizer)}, which is not in files")
        self._check_tables(owners)
        if (self.video.frames - 1) % self.latents.temporal_stride:
            raise ValueError(
                f"video.frames {self.video.frames} is not 1 plus a multiple of {self.latents.temporal_stride}"
            )
        for side, patch in (("height", self.model.patch_size[1]), ("width", self.model.patch_size[2])):
            unit = self.latents.spatial_stride * patch
            if getattr(self.video, side) % unit:
                raise ValueError(f"video.{side} {getattr(self.video, side)} is not a multiple of {unit} pixels")
        self.family.check(self)
        return self

    @property
    def family(self) -> Family:
        """What knows how to run such a model."""
        return FAMILIES[self.model.family]

    def _check_tables(self, owners: dict[str, str]) -> None:
        for field, table in self.text.tables.items():
            if table.file not in self.files:
                raise ValueError(f"text.{field} needs {quote(table.file)}, which is not in files")
            if table.file in owners or table.file == self.text.tokenizer:
                raise ValueError(f"text.{field} shares {quote(table.file)} with another part")
            owners[table.file] = field
            if self.files[table.file].size != table.size:
                raise ValueError(
                    f"{quote(table.file)} has {self.files[table.file].size} bytes, and {table.rows} x {table.dim} of "
                    f"{table.dtype} take {table.size}"
                )


@cache
def _manifest_type(family: Family) -> type[Manifest]:
    """The manifest of one family: its `model` and `sampler` have fields of their own."""
    return create_model("Manifest", __base__=Manifest, model=(family.model, ...), sampler=(family.sampler, ...))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Checked manifest from the bytes of `manifest.json`; `where` names the file in messages.

    Raises BundleError, whatever the bytes are.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where} is larger than {MAX_MANIFEST_BYTES} bytes: no bundle needs that. {_REMEDY}")
    try:
        document = read_json(data)
    except ValueError as error:
        raise BundleError(f"{where} is not valid JSON: {error}. {_REMEDY}") from None
    if not isinstance(document, dict):
        raise BundleError(f"{where} holds a JSON {type(document).__name__}, not an object. {_REMEDY}")
    version = document.get("schema_version")
    # Checked before anything else, so that a newer bundle says "newer" and not "unknown field".
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{where} has schema_version {quote(version)}, and this version of tmd reads {SCHEMA_VERSION}. "
            "Use the tmd version that made the bundle, or export the bundle again with tmd-export."
        )
    model = document.get("model")
    name = model.get("family") if isinstance(model, dict) else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise BundleError(
            f"{where}: model.family: must be one of {', '.join(FAMILIES)} (found {quote(name)}). {_REMEDY}"
        )
    try:
        return _manifest_type(family).model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{where}: {_first_problem(error)}. {_REMEDY}") from None


_REMEDY = "Copy the bundle again, or make it again with tmd-export."


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    loc = first["loc"]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{quote(part, 64)[1:-1]}" for part in loc if part != "[key]"
    ).lstrip(".")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    found = first["input"]
    shown = f" (found {quote(found)})" if isinstance(found, str | int | float | bool | None) else ""
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{place or 'manifest'}: {reason}{shown}{more}"
