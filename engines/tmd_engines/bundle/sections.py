"""The sections of a manifest, as types. What a family adds to `model` and `sampler` is in its own module."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from ..errors import quote
from .fields import Count, Dimension, FileName, Identifier, Part, Sha256, StepCount, Text

MAX_TENSORS = 256  # inputs or outputs of one graph
MAX_FILE_BYTES = 1 << 40  # 1 TiB
MAX_LORAS = 64
MAX_STRENGTH = 1000.0  # of a LoRA, in both directions


class ModelInfo(Part):
    """What the graphs compute. Counts; `dim` is the token width D, `patch_size` (frames, height, width) in latents.

    `family` names what knows how to run it, `architecture` the network it was made from. `head_blocks` of the
    `num_layers` blocks are in the graph `flow_head`.
    """

    name: Text
    family: Text
    architecture: Text
    dim: Count
    num_layers: Count
    head_blocks: Count
    num_heads: Count
    head_dim: Count
    patch_size: tuple[Count, Count, Count]

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.dim != self.num_heads * self.head_dim:
            raise ValueError(f"dim {self.dim} is not num_heads {self.num_heads} x head_dim {self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary embedding turns pairs")
        return self


def check_cut(model: Any) -> Any:
    """For a model that is cut in two: raises ValueError if nothing is left to the backbone."""
    if model.head_blocks >= model.num_layers:
        raise ValueError(
            f"head_blocks {model.head_blocks} leaves no block of num_layers {model.num_layers} to the backbone"
        )
    return model


class SamplerInfo(Part):
    """How a model is sampled by default: the name of its update, and how many steps."""

    rule: Text
    steps: StepCount


def check_allowed(name: str, default: int, allowed: tuple[int, ...]) -> None:
    """Raises ValueError unless the default is one of the allowed counts, which ascend."""
    if list(allowed) != sorted(set(allowed)):
        raise ValueError(f"allowed_{name} must be ascending without repeats")
    if default not in allowed:
        raise ValueError(f"{name} {default} is not among allowed_{name} {list(allowed)}")


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
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8", "nvfp4"]
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


class LoraInfo(Part):
    """A LoRA that was merged into the weights: name and sha256 of its file, and the factor that it was added with."""

    file: Text
    sha256: Sha256
    strength: Annotated[float, Field(ge=-MAX_STRENGTH, le=MAX_STRENGTH)]


class Provenance(Part):
    """Where the bundle comes from: source and the sha256 of its files, the LoRAs merged into it in the order in which
    they were added, tool, library versions, ISO 8601 time."""

    source: Text
    source_sha256: Annotated[dict[Text, Sha256], Field(max_length=1024)]
    loras: Annotated[tuple[LoraInfo, ...], Field(max_length=MAX_LORAS)] = ()
    tool: Text
    versions: Annotated[dict[Text, Text], Field(max_length=64)]
    created: Annotated[str, StringConstraints(pattern=_CREATED)]
