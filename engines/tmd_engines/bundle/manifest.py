"""The manifest of a bundle, schema version 1, as types.

`parse_manifest` turns untrusted bytes into a `Manifest` or a `BundleError`, and nothing else. The models are strict (no
number from a string, no bool for an int, no unknown field) and frozen. What needs the files is in `reader.py`.
The same schema for people is `docs/bundle.md`; change both together.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator

from ..errors import BundleError, quote
from .fields import (
    MANIFEST_NAME,
    Count,
    Dimension,
    FileName,
    Identifier,
    Part,
    Sha256,
    Text,
)
from .sampler import (
    KIND_OF_RULE,
    RULES,
    FlowMapSampler,
    SamplerInfo,
    TransitionSampler,
    VelocitySampler,
)
from .strict_json import read_json
from .text import EmbeddingTable, TextInfo

__all__ = [
    "MANIFEST_NAME", "MAX_MANIFEST_BYTES", "RULES", "SCHEMA_VERSION", "Accuracy", "EmbeddingTable", "FileInfo",
    "FlowMapSampler", "GraphInfo", "LatentInfo", "Manifest", "ModelInfo", "Provenance", "SamplerInfo", "TensorSpec",
    "TextInfo", "TransitionSampler", "VelocitySampler", "VideoInfo", "parse_manifest",
]  # fmt: skip

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = (
    1 << 20
)  # the built-in model's manifest is about 25 kB; one with 32 caches per graph stays below 100 kB
MAX_GRAPHS = 32
MAX_FILES = 128
MAX_TENSORS = 256  # inputs or outputs of one graph
MAX_FILE_BYTES = 1 << 40  # 1 TiB


class ModelInfo(Part):
    """What the graphs compute. Counts; `dim` is the token width D, `patch_size` (frames, height, width) in latents.

    Kind "tmd" is a student with an inner flow, whose `fusion` says how the flow head takes in the features; kind "wan"
    is a Wan transformer in the same two graphs, without inner flow and without fusion. Kind "tim" is a Transition Model
    of stills: all its blocks are in `flow_head`, `rope` says what its rotary tables count, and `classes` how many it
    knows in place of a prompt.
    """

    name: Text
    family: Text
    kind: Literal["tmd", "wan", "tim"]
    dim: Count
    num_layers: Count
    head_blocks: Count
    num_heads: Count
    head_dim: Count
    patch_size: tuple[Count, Count, Count]
    fusion: Literal["gated", "concat"] | None = None
    rope: Literal["index", "grid"] | None = None
    classes: Count | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim != self.num_heads * self.head_dim:
            raise ValueError(f"dim {self.dim} is not num_heads {self.num_heads} x head_dim {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs")
        if self.kind == "tim":
            if self.head_blocks != self.num_layers:
                raise ValueError(
                    f"head_blocks {self.head_blocks} is not num_layers {self.num_layers}, as in kind 'tim'"
                )
        elif self.head_blocks >= self.num_layers:
            raise ValueError(
                f"head_blocks {self.head_blocks} leaves no block of num_layers {self.num_layers} to the backbone"
            )
        if (self.fusion is not None) != (self.kind == "tmd"):
            raise ValueError(f"fusion {quote(self.fusion)} does not go with kind {quote(self.kind)}")
        if (self.rope is not None) != (self.kind == "tim"):
            raise ValueError(f"rope {quote(self.rope)} does not go with kind {quote(self.kind)}")
        if self.classes is not None and self.kind != "tim":
            raise ValueError(f"classes do not go with kind {quote(self.kind)}")
        return self


class LatentInfo(Part):
    """Latent geometry: `channels`, pixels per latent in time and space; `mean`, `std` per channel, in decoder units."""

    channels: Annotated[int, Field(ge=1, le=1024)]
    temporal_stride: Annotated[int, Field(ge=1, le=64)]
    spatial_stride: Annotated[int, Field(ge=1, le=256)]
    mean: Annotated[tuple[float, ...], Field(max_length=1024)]
    std: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(max_length=1024)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean has {len(self.mean)} and std {len(self.std)} values for {self.channels} channels")
        return self


class VideoInfo(Part):
    """Default output: `frames`, `width` and `height` in pixels, `fps` in frames per second."""

    frames: Annotated[int, Field(ge=1, le=100_000)]
    width: Annotated[int, Field(ge=1, le=65_536)]
    height: Annotated[int, Field(ge=1, le=65_536)]
    fps: Annotated[int, Field(ge=1, le=1000)]


class TensorSpec(Part):
    """One input or output of a graph.

    A dimension is a positive int, a symbol ("height"), or a multiple of one ("8*height").
    """

    name: Identifier
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]

    def factors(self) -> list[tuple[int, str | None]]:
        """The shape as (factor, symbol) per dimension; a fixed dimension has symbol None."""
        return [_split_dimension(dimension) for dimension in self.shape]

    def resolve(self, **dims: int) -> tuple[int, ...]:
        """The shape in numbers, symbols taken from `dims` (others in `dims` are ignored). Raises KeyError(symbol)."""
        return tuple(factor if symbol is None else factor * dims[symbol] for factor, symbol in self.factors())


def _split_dimension(dimension: int | str) -> tuple[int, str | None]:
    if isinstance(dimension, int):
        return dimension, None
    factor, star, symbol = dimension.rpartition("*")
    return (int(factor) if star else 1), symbol


class Accuracy(Part):
    """Measured when the graph was exported: its outputs against `reference`, same inputs.

    `max_abs_error` is in output units; `cosine` is dimensionless (float rounding up to 1e-6 above 1 is accepted).
    """

    max_abs_error: Annotated[float, Field(ge=0.0)]
    cosine: Annotated[float, Field(ge=-1.0, le=1.000001)]
    reference: Text


class GraphInfo(Part):
    """One ONNX file, `X.onnx`, with its weights in `X.onnx.data` (`data` null: all weights are inside `file`).

    `precision` is that of the arithmetic, `storage` that of the large weights in the file, each with a `Cast` (fp16) or
    a `DequantizeLinear` (int8) behind it.
    """

    file: FileName
    data: FileName | None = None
    opset: Annotated[int, Field(ge=1, le=1000)]
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8"]
    storage: Literal["fp32", "fp16", "int8"] | None = None
    inputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=MAX_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Field(min_length=1, max_length=MAX_TENSORS)]
    accuracy: Accuracy | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.file.endswith(".onnx"):
            raise ValueError(f"file {quote(self.file)} must end in '.onnx'")
        if self.data is not None and self.data != self.file + ".data":
            raise ValueError(
                f"data {quote(self.data)} must be {quote(self.file + '.data')}: a graph has its own data file"
            )
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(names) != len(set(names)):
            raise ValueError("two inputs or outputs have the same name")
        return self


class FileInfo(Part):
    """`size` in bytes and `sha256` in lower-case hex of one file of the bundle."""

    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


_DATE, _TIME = "[0-9]{4}-[0-9]{2}-[0-9]{2}", r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?"
_CREATED = rf"^{_DATE}T{_TIME}(Z|[+-][0-9]{{2}}:[0-9]{{2}})$"  # not \d, which takes the digits of every script


class Provenance(Part):
    """Where the bundle comes from: source and the sha256 of its files, tool, library versions, ISO 8601 time."""

    source: Text
    source_sha256: Annotated[dict[Text, Sha256], Field(max_length=1024)]
    tool: Text
    versions: Annotated[dict[Text, Text], Field(max_length=64)]
    created: Annotated[str, StringConstraints(pattern=_CREATED)]


class Manifest(Part):
    """`manifest.json` of a bundle. Every file of the bundle but the manifest itself stands in `files`."""

    schema_version: Literal[1]
    model: ModelInfo
    sampler: Annotated[SamplerInfo, Field(discriminator="rule")]
    latents: LatentInfo
    video: VideoInfo
    text: TextInfo
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
        if KIND_OF_RULE.get(self.sampler.rule, "wan") != self.model.kind:
            raise ValueError(f"sampler.rule {quote(self.sampler.rule)} is not for kind {quote(self.model.kind)}")
        if self.model.kind != "tim" and (self.text.tokenization != "wan" or self.text.null_embeds is not None):
            raise ValueError(
                f"text.tokenization 'plain' and text.null_embeds are not for kind {quote(self.model.kind)}"
            )
        if (self.video.frames - 1) % self.latents.temporal_stride:
            raise ValueError(
                f"video.frames {self.video.frames} is not 1 plus a multiple of {self.latents.temporal_stride}"
            )
        for side, patch in (("height", self.model.patch_size[1]), ("width", self.model.patch_size[2])):
            unit = self.latents.spatial_stride * patch
            if getattr(self.video, side) % unit:
                raise ValueError(f"video.{side} {getattr(self.video, side)} is not a multiple of {unit} pixels")
        return self

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
        encoder, has_table = self.graphs.get("text_encoder"), self.text.embedding is not None
        if encoder is not None and any(spec.name == "token_embeds" for spec in encoder.inputs) != has_table:
            raise ValueError("graph 'text_encoder' has an input 'token_embeds' exactly if there is a text.embedding")


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
            "Use the tmd version that made the bundle, or export the bundle again."
        )
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BundleError(f"{where}: {_first_problem(error)}. {_REMEDY}") from None


_REMEDY = "Copy the bundle again, or make it again with tmd-export."


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    loc = first["loc"]
    if loc[:1] == ("sampler",) and loc[1:2] and loc[1] in RULES:
        loc = (loc[0], *loc[2:])  # which member of the union it was is no place in the file
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{quote(part, 64)[1:-1]}" for part in loc if part != "[key]"
    ).lstrip(".")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    found = first["input"]
    if first["type"].startswith("union_tag_"):  # pydantic's own sentence would repeat the tag as it stands
        place, reason, found = f"{place}.rule", f"must be one of {', '.join(RULES)}", found.get("rule")
    shown = f" (found {quote(found)})" if isinstance(found, str | int | float | bool | None) else ""
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{place or 'manifest'}: {reason}{shown}{more}"
