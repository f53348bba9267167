"""The manifest of a bundle, schema version 1, as types.

`parse_manifest` turns untrusted bytes into a `Manifest` or a `BundleError`, and nothing else. The models are strict (no
number from a string, no bool for an int, no unknown field) and frozen. What needs the files is in `bundle.py`.
The same schema for people is `docs/bundle.md`; change both together.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from .errors import BundleError, quote

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = (
    1 << 20
)  # the built-in model's manifest is about 25 kB; one with 32 caches per graph stays below 100 kB
MAX_GRAPHS = 32
MAX_FILES = 128
MAX_TENSORS = 256  # inputs or outputs of one graph
MAX_DIMENSION = 1 << 31
MAX_FILE_BYTES = 1 << 40  # 1 TiB

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIMENSION = re.compile(r"(?:([1-9][0-9]{0,5})\*)?([A-Za-z_][A-Za-z0-9_]{0,31})")


def _check_file_name(name: str) -> str:
    """A plain name only: it is joined to the bundle's folder, and nothing else may come of that."""
    if "/" in name or "\\" in name:
        raise ValueError("a file name must be a plain name, without folders (no separator, no '..', not absolute)")
    if name == MANIFEST_NAME:
        raise ValueError("the manifest cannot list itself")
    if not _FILE_NAME.fullmatch(name):
        raise ValueError(
            "a file name may hold letters, digits, '.', '_' and '-', at most 128, and not start with '.' or '-'"
        )
    return name


def _check_dimension(value: int | str) -> int | str:
    if isinstance(value, int):
        if not 1 <= value <= MAX_DIMENSION:
            raise ValueError(f"a fixed dimension must be from 1 to {MAX_DIMENSION}")
    elif not _DIMENSION.fullmatch(value):
        raise ValueError("a symbolic dimension is a name such as 'height', or a multiple of one such as '8*height'")
    return value


# Free text is printed by `tmd-engine inspect`: control characters could rewrite the terminal.
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]*$"
Text = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=_PRINTABLE)]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,63}$")]
FileName = Annotated[str, AfterValidator(_check_file_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Dimension = Annotated[int | str, AfterValidator(_check_dimension)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
StepCount = Annotated[int, Field(ge=1, le=1000)]
Shift = Annotated[float, Field(ge=1.0, le=1000.0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=())


class ModelInfo(_Part):
    """What the graphs compute. Counts; `dim` is the token width D, `patch_size` (frames, height, width) in latents."""

    name: Text
    family: Text
    kind: Literal["tmd"]
    dim: Count
    num_layers: Count
    head_blocks: Count
    num_heads: Count
    head_dim: Count
    patch_size: tuple[Count, Count, Count]
    fusion: Literal["gated", "concat"]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim != self.num_heads * self.head_dim:
            raise ValueError(f"dim {self.dim} is not num_heads {self.num_heads} x head_dim {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs")
        if self.head_blocks >= self.num_layers:
            raise ValueError(
                f"head_blocks {self.head_blocks} leaves no block of num_layers {self.num_layers} to the backbone"
            )
        return self


class SamplerInfo(_Part):
    """How to sample: defaults, and the step counts the model was trained for. Times are dimensionless, 0 is data."""

    rule: Literal["transition"]
    steps: StepCount
    inner_steps: StepCount
    allowed_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=64)]
    allowed_inner_steps: Annotated[tuple[StepCount, ...], Field(min_length=1, max_length=64)]
    shift: Shift
    inner_shift: Shift
    t_max: Annotated[float, Field(gt=0.0, le=1.0)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for default, allowed in (("steps", "allowed_steps"), ("inner_steps", "allowed_inner_steps")):
            values = getattr(self, allowed)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{allowed} must be ascending without repeats")
            if getattr(self, default) not in values:
                raise ValueError(f"{default} {getattr(self, default)} is not among {allowed} {list(values)}")
        return self


class LatentInfo(_Part):
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


class VideoInfo(_Part):
    """Default output: `frames`, `width` and `height` in pixels, `fps` in frames per second."""

    frames: Annotated[int, Field(ge=1, le=100_000)]
    width: Annotated[int, Field(ge=1, le=65_536)]
    height: Annotated[int, Field(ge=1, le=65_536)]
    fps: Annotated[int, Field(ge=1, le=1000)]


class TextInfo(_Part):
    """Prompt side: sentencepiece `tokenizer` file (null: none here), `max_length` in tokens, embedding `dim`."""

    tokenizer: FileName | None = None
    max_length: Annotated[int, Field(ge=1, le=65_536)]
    dim: Count
    pad_id: Annotated[int, Field(ge=0, le=1 << 24)]
    eos_id: Annotated[int, Field(ge=0, le=1 << 24)]


class TensorSpec(_Part):
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


class Accuracy(_Part):
    """Measured when the graph was exported: its outputs against `reference`, same inputs.

    `max_abs_error` is in output units; `cosine` is dimensionless (float rounding up to 1e-6 above 1 is accepted).
    """

    max_abs_error: Annotated[float, Field(ge=0.0)]
    cosine: Annotated[float, Field(ge=-1.0, le=1.000001)]
    reference: Text


class GraphInfo(_Part):
    """One ONNX file, `X.onnx`, with its weights in `X.onnx.data` (`data` null: all weights are inside `file`).

    `precision` is that of the arithmetic, `storage` that of the large weights in the file, each cast when it is fp16.
    """

    file: FileName
    data: FileName | None = None
    opset: Annotated[int, Field(ge=1, le=1000)]
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8"]
    storage: Literal["fp32", "fp16"] | None = None
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


class FileInfo(_Part):
    """`size` in bytes and `sha256` in lower-case hex of one file of the bundle."""

    size: Annotated[int, Field(ge=0, le=MAX_FILE_BYTES)]
    sha256: Sha256


class Provenance(_Part):
    """Where the bundle comes from: source and the sha256 of its files, tool, library versions, ISO 8601 time."""

    source: Text
    source_sha256: Annotated[dict[Text, Sha256], Field(max_length=1024)]
    tool: Text
    versions: Annotated[dict[Text, Text], Field(max_length=64)]
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$")]


class Manifest(_Part):
    """`manifest.json` of a bundle. Every file of the bundle but the manifest itself stands in `files`."""

    schema_version: Literal[1]
    model: ModelInfo
    sampler: SamplerInfo
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
        if (self.video.frames - 1) % self.latents.temporal_stride:
            raise ValueError(
                f"video.frames {self.video.frames} is not 1 plus a multiple of {self.latents.temporal_stride}"
            )
        for side, patch in (("height", self.model.patch_size[1]), ("width", self.model.patch_size[2])):
            unit = self.latents.spatial_stride * patch
            if getattr(self.video, side) % unit:
                raise ValueError(f"video.{side} {getattr(self.video, side)} is not a multiple of {unit} pixels")
        return self


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Checked manifest from the bytes of `manifest.json`; `where` names the file in messages.

    Raises BundleError, whatever the bytes are.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{where} is larger than {MAX_MANIFEST_BYTES} bytes: no bundle needs that. {_REMEDY}")
    document = _read_json(data, where)
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


def _read_json(data: bytes, where: str) -> Any:
    """JSON that every reader understands alike: UTF-8, no repeated keys (readers differ in which one wins), no NaN."""

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {quote(key)} appears twice")
            found[key] = value
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_repeats, parse_constant=no_constant)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = quote(str(error), 200)[1:-1]
    raise BundleError(f"{where} is not valid JSON: {reason}. {_REMEDY}")


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    place = "".join(
        f"[{part}]" if isinstance(part, int) else f".{quote(part, 64)[1:-1]}"
        for part in first["loc"]
        if part != "[key]"
    ).lstrip(".")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    found = first["input"]
    shown = f" (found {quote(found)})" if isinstance(found, str | int | float | bool | None) else ""
    more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return f"{place or 'manifest'}: {reason}{shown}{more}"
