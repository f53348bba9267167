"""The six graphs of a bundle: which module computes each, and what its inputs and outputs are called.

A `Graph` is a torch module with the interface that the manifest will state. Everything else of the export (tracing,
lint, verification) reads that interface and knows no model. Letters in shapes as in `tmd_ref.wan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tmd_engines import TensorSpec
from tmd_ref.gemma import GemmaEncoder
from tmd_ref.split import SplitWan
from tmd_ref.student import FlowHead, TMDStudent, flow_head_step
from tmd_ref.taehv import TAEHV
from tmd_ref.tim.split import SplitTiM
from tmd_ref.umt5 import UMT5Encoder
from tmd_ref.vae import WanVAE

from ..parts import PARTS
from ..sources.still_vae import StillVAE
from .update import Update

Shape = tuple[int | str, ...]
VideoDecoder = WanVAE | TAEHV

TABLE_BYTES = 256 << 20  # in float32; a larger embedding table becomes a file of its own, of which a run reads few rows


@dataclass(frozen=True)
class Graph:
    """A module to export and its interface in the order of its arguments and results.

    `multiples`: symbols whose sizes come in steps (height in patches). `vocabulary`: ids below it are valid, for graphs
    that take ids.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiples: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 1

    def __post_init__(self) -> None:
        self.module.eval()

    def sizes(self, **dims: int) -> dict[str, int]:
        """`dims` and the number of tokens that those of them make which are free in this graph."""
        tokens, free = 1, {symbol for spec in self.inputs for _, symbol in spec.factors()}
        for side in ("frames", "height", "width"):
            tokens *= dims.get(side, 1) // self.multiples.get(side, 1) if side in free else 1
        return {**dims, "tokens": tokens}

    def random_inputs(self, seed: int, **dims: int) -> dict[str, Tensor]:
        """Inputs for these sizes: normal values, times in 0..1 with r <= s, angles, ids, bytes, a ragged mask."""
        generator = torch.Generator().manual_seed(seed)
        sizes = self.sizes(**dims)
        angles: Tensor | None = None
        given: dict[str, Tensor] = {}
        for spec in self.inputs:
            shape = spec.resolve(**sizes)
            if spec.name in ("input_ids", "labels"):
                given[spec.name] = torch.randint(0, self.vocabulary, shape, generator=generator)
            elif spec.name == "attention_mask":
                lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
                given[spec.name] = (torch.arange(shape[1]) < lengths).long()
            elif spec.name in ("t", "s"):
                given[spec.name] = torch.rand(shape, generator=generator)
            elif spec.name == "r":
                given[spec.name] = given["s" if "s" in given else "t"] * torch.rand(shape, generator=generator)
            elif spec.name.startswith("rope_"):
                angles = 6.3 * torch.rand(shape, generator=generator) if angles is None else angles
                given[spec.name] = angles.cos() if spec.name == "rope_cos" else angles.sin()
            elif spec.dtype == "uint8":
                given[spec.name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            else:
                given[spec.name] = torch.randn(shape, generator=generator)
        return given


class FlowHeadStep(nn.Module):
    """The flow head with the inner update around it, so that every host runs the same arithmetic."""

    def __init__(self, head: FlowHead) -> None:
        super().__init__()
        self.head = head

    def forward(
        self,
        y: Tensor,
        noise: Tensor,
        s: Tensor,
        r: Tensor,
        features: Tensor,
        context: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
    ) -> Tensor:
        return flow_head_step(self.head, y, noise, s, r, features, context, rope_cos, rope_sin)


class EncoderOfRows(nn.Module):
    """The text encoder behind its embedding table: a prompt needs 512 of UMT5-XXL's 256,384 rows."""

    def __init__(self, encoder: UMT5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder.encode(token_embeds, attention_mask)


class GemmaOfRows(nn.Module):
    """The same of Gemma, which has no padding."""

    def __init__(self, encoder: GemmaEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, token_embeds: Tensor) -> Tensor:
        return self.encoder.encode(token_embeds)


class DecoderFirst(nn.Module):
    """Normalised latents of the first latent frame to one picture and the caches."""

    def __init__(self, vae: VideoDecoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        video, caches = self.vae.decode_first(latents)
        return (to_frames(video), *caches)


class DecoderStep(nn.Module):
    """Normalised latents of a later latent frame and the caches to its pictures and the next caches."""

    def __init__(self, vae: VideoDecoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        video, caches_next = self.vae.decode_step(latents, caches)
        return (to_frames(video), *caches_next)


class StillDecoder(nn.Module):
    """Latents of a still to one picture; a decoder that knows no time has no caches."""

    float32_only = True  # its layers, diffusers' own, do not cast between their types

    def __init__(self, vae: StillVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return to_frames(self.vae.decode(latents))


class PictureEncoder(nn.Module):
    """A picture, uint8 `[B,1,H,W,3]` as a decoder gives it, to normalised latents: their mean."""

    def __init__(self, vae: WanVAE | StillVAE) -> None:
        super().__init__()
        self.vae, self.float32_only = vae, isinstance(vae, StillVAE)

    def forward(self, frames: Tensor) -> Tensor:
        return self.vae.encode(frames.float().permute(0, 4, 1, 2, 3) / 127.5 - 1)


def to_frames(video: Tensor) -> Tensor:
    """Video `[B,3,F,H,W]`, already clamped to -1..1 by the decoder -> uint8 `[B,F,H,W,3]`, rounded to nearest."""
    return torch.round(video * 127.5 + 127.5).to(torch.uint8).permute(0, 2, 3, 4, 1)


def text_encoder(encoder: UMT5Encoder | GemmaEncoder) -> Graph:
    """From token ids; from rows of the embedding table if that is too large to lie in a graph."""
    config, ids = encoder.config, ("batch", "text")
    mask = () if isinstance(encoder, GemmaEncoder) else (_tensor("attention_mask", ids, "int64"),)
    prompt_embeds = _tensor("prompt_embeds", (*ids, config.dim))
    if 4 * config.vocab_size * config.dim > TABLE_BYTES:
        rows = _tensor("token_embeds", (*ids, config.dim))
        of_rows = GemmaOfRows(encoder) if isinstance(encoder, GemmaEncoder) else EncoderOfRows(encoder)
        return Graph("text_encoder", of_rows, (rows, *mask), (prompt_embeds,))
    tokens = _tensor("input_ids", ids, "int64")
    return Graph("text_encoder", encoder, (tokens, *mask), (prompt_embeds,), vocabulary=config.vocab_size)


def backbone(student: TMDStudent | SplitWan | SplitTiM) -> Graph:
    """The first graph: once per step, or for a Transition Model what depends on the prompt alone."""
    if isinstance(student, SplitTiM):
        return tim_prompt(student)
    config = student.config
    return Graph(
        "backbone",
        student.backbone,
        (
            _tensor("x", ("batch", config.in_channels, "frames", "height", "width")),
            _tensor("t", ("batch",)),
            _tensor("prompt_embeds", ("batch", "text", config.text_dim)),
            *_rope(config.head_dim),
        ),
        (
            _tensor("features", ("batch", "tokens", config.dim)),
            _tensor("context", ("batch", "text", config.dim)),
        ),
        _patches(config.patch_size),
    )


def flow_head(student: TMDStudent | SplitWan | SplitTiM) -> Graph:
    """The second graph: one step of a student's inner flow, the rest of a Wan transformer that has none, or one whole
    step of a Transition Model."""
    if isinstance(student, SplitTiM):
        return tim_transition(student)
    config = student.config
    latents: Shape = ("batch", config.out_channels, "frames", "height", "width")
    if isinstance(student, SplitWan):
        return Graph(
            "flow_head",
            student.head,
            (
                _tensor("x", ("batch", config.in_channels, "frames", "height", "width")),
                _tensor("t", ("batch",)),
                _tensor("features", ("batch", "tokens", config.dim)),
                _tensor("context", ("batch", "text", config.dim)),
                *_rope(config.head_dim),
            ),
            (_tensor("velocity", latents),),
            _patches(config.patch_size),
        )
    return Graph(
        "flow_head",
        FlowHeadStep(student.head),
        (
            _tensor("y", latents),
            _tensor("noise", latents),
            _tensor("s", ("batch",)),
            _tensor("r", ("batch",)),
            _tensor("features", ("batch", "tokens", config.dim)),
            _tensor("context", ("batch", "text", config.dim)),
            *_rope(config.head_dim),
        ),
        (_tensor("y_next", latents),),
        _patches(config.patch_size),
    )


def tim_prompt(split: SplitTiM) -> Graph:
    config = split.config
    if config.num_classes is not None:
        labels = _tensor("labels", ("batch",), "int64")
        context = _tensor("context", ("batch", config.dim))
        return Graph("backbone", split.prompt, (labels,), (context,), vocabulary=config.num_classes + 1)
    prompt_embeds = _tensor("prompt_embeds", ("batch", "text", config.text_dim or 0))
    return Graph("backbone", split.prompt, (prompt_embeds,), (_tim_context(split),))


def tim_transition(split: SplitTiM) -> Graph:
    config = split.config
    x: Shape = ("batch", config.in_channels, 1, "height", "width")
    context = _tim_context(split) if config.num_classes is None else _tensor("context", ("batch", config.dim))
    return Graph(
        "flow_head",
        split.transition,
        (
            _tensor("x", x),
            _tensor("t", ("batch",)),
            _tensor("r", ("batch",)),
            _tensor("guidance", ("batch", "batch")),
            context,
            *_rope(config.head_dim),
        ),
        (_tensor("x_next", x),),
        {"height": config.patch, "width": config.patch},
    )


def update(channels: int, stills: bool) -> Graph:
    """The graph of every update that a host makes."""
    latents: Shape = ("batch", channels, 1 if stills else "frames", "height", "width")
    names = ("x", "velocity", "negative", "noise", "before_1", "before_2")
    return Graph(
        "update",
        Update(),
        (*(_tensor(name, latents) for name in names), _tensor("coefficients", (7,))),
        (_tensor("x_next", latents), _tensor("data", latents), _tensor("magnitude", (1,))),
    )


def _tim_context(split: SplitTiM) -> TensorSpec:
    """Keys and values of all blocks."""
    return _tensor("context", (split.config.num_layers, "batch", "text", 2 * split.config.dim))


def encoder(vae: WanVAE | StillVAE) -> Graph:
    return Graph("encoder", PictureEncoder(vae), *_still(vae))


def decoder_first(vae: VideoDecoder | StillVAE) -> Graph:
    if isinstance(vae, StillVAE):
        picture, latents = _still(vae)
        return Graph("decoder_first", StillDecoder(vae), latents, picture)
    frames, caches = _decoded(vae, later=False)
    outputs = [_tensor(f"cache_{number:02d}", shape) for number, shape in enumerate(caches)]
    return Graph("decoder_first", DecoderFirst(vae), (_latent_frame(vae),), (frames, *outputs))


def decoder_step(vae: VideoDecoder) -> Graph:
    frames, caches = _decoded(vae, later=True)
    inputs = [_tensor(f"cache_{number:02d}", shape) for number, shape in enumerate(caches)]
    outputs = [_tensor(f"cache_{number:02d}_next", shape) for number, shape in enumerate(caches)]
    return Graph("decoder_step", DecoderStep(vae), (_latent_frame(vae), *inputs), (frames, *outputs))


def _still(vae: WanVAE | StillVAE) -> tuple[tuple[TensorSpec], tuple[TensorSpec]]:
    """One picture, and its latents."""
    stride = vae.spatial_stride if isinstance(vae, StillVAE) else spatial_stride(vae.config.dim_mult)
    channels = vae.latent_channels if isinstance(vae, StillVAE) else vae.config.z_dim
    picture: Shape = ("batch", 1, _times(stride, "height"), _times(stride, "width"), 3)
    latents = _tensor("latents", ("batch", channels, 1, "height", "width"))
    return (_tensor("frames", picture, "uint8"),), (latents,)


def temporal_stride(temporal_downsample: tuple[bool, ...]) -> int:
    """Video frames per latent frame, after the first."""
    return 1 << sum(temporal_downsample)


def spatial_stride(dim_mult: tuple[int, ...]) -> int:
    """Pixels per latent, in height and in width."""
    return 1 << (len(dim_mult) - 1)


BUILDERS: Mapping[str, Callable[..., Graph]] = {
    "encoder": encoder,
    "text_encoder": text_encoder,
    "backbone": backbone,
    "flow_head": flow_head,
    "decoder_first": decoder_first,
    "decoder_step": decoder_step,
}
"""Part -> the function that makes its graph, from the model of `parts.MODEL_OF`."""

if tuple(BUILDERS) != PARTS:
    raise RuntimeError("graphs.BUILDERS and parts.PARTS name different graphs")


def _tensor(name: str, shape: Shape, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def _rope(head_dim: int) -> tuple[TensorSpec, TensorSpec]:
    shape: Shape = ("tokens", head_dim // 2)
    return _tensor("rope_cos", shape), _tensor("rope_sin", shape)


def _patches(patch_size: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("frames", "height", "width"), patch_size, strict=True))


def _latent_frame(vae: VideoDecoder) -> TensorSpec:
    return _tensor("latents", ("batch", vae.config.z_dim, 1, "height", "width"))


def _decoded(vae: VideoDecoder, later: bool) -> tuple[TensorSpec, list[Shape]]:
    """Frames and shapes of the caches that the first latent frame gives, or a `later` one.

    Asked of the decoder itself: with latents of one pixel, its sizes are the factors.
    """
    with torch.no_grad():
        pixel = torch.zeros(1, vae.config.z_dim, 1, 1, 1, device=next(vae.parameters()).device)
        video, caches = vae.decode_first(pixel)
        if later:
            video, caches = vae.decode_step(pixel, caches)
    _, _, count, height, width = video.shape
    frames = _tensor("frames", ("batch", count, _times(height, "height"), _times(width, "width"), 3), "uint8")
    return frames, [
        ("batch", cache.shape[1], cache.shape[2], _times(cache.shape[3], "height"), _times(cache.shape[4], "width"))
        for cache in caches
    ]


def _times(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"
