"""The graphs of an autoencoder: a picture to latents, and latents to pictures, one latent frame at a time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tmd_engines.bundle.families.signature import Shape
from tmd_ref.taehv import TAEHV
from tmd_ref.vae import WanVAE

from ..sources.still_vae import StillVAE
from .graph import Graph, Interface, spec

VideoDecoder = WanVAE | TAEHV


class DecoderFirst(nn.Module):
    """Normalised latents of the first latent frame to the caches and one picture.

    Engines compute outputs in turn. With the picture in front OpenVINO keeps the input of every convolution until it is
    done, to take the caches out of them then.
    """

    def __init__(self, vae: VideoDecoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        video, caches = self.vae.decode_first(latents)
        return (*caches, *to_frames(video))


class DecoderStep(nn.Module):
    """Normalised latents of a later latent frame and the caches to the next caches and its pictures."""

    def __init__(self, vae: VideoDecoder) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        video, caches_next = self.vae.decode_step(latents, caches)
        return (*caches_next, *to_frames(video))


class StillDecoder(nn.Module):
    """Latents of a still to one picture; a decoder that knows no time has no caches."""

    float32_only = True  # its layers, diffusers' own, do not cast between their types

    def __init__(self, vae: StillVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        return to_frames(self.vae.decode(latents))


class PictureEncoder(nn.Module):
    """A picture, uint8 `[B,1,H,W,3]` as a decoder gives it, to normalised latents: their mean."""

    def __init__(self, vae: WanVAE | StillVAE) -> None:
        super().__init__()
        self.vae, self.float32_only = vae, isinstance(vae, StillVAE)

    def forward(self, frames: Tensor) -> Tensor:
        return self.vae.encode(frames.float().permute(0, 4, 1, 2, 3) / 127.5 - 1)


def to_frames(video: Tensor) -> tuple[Tensor, Tensor]:
    """Video `[B,3,F,H,W]` about -1..1 -> uint8 `[B,F,H,W,3]`, clamped and rounded to nearest, and its mean size `[1]`.

    NaN and Inf cannot be told from pixels in uint8; the mean is NaN or Inf exactly if a value of the video is.
    """
    frames = torch.round(video.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8).permute(0, 2, 3, 4, 1)
    return frames, video.abs().reshape(-1).mean(0, keepdim=True)


def encoder(vae: WanVAE | StillVAE, interface: Interface) -> Graph:
    return Graph("encoder", PictureEncoder(vae), *interface.of("encoder"))


def decoder_first(vae: VideoDecoder | StillVAE, interface: Interface) -> Graph:
    module = StillDecoder(vae) if isinstance(vae, StillVAE) else DecoderFirst(vae)
    return Graph("decoder_first", module, *interface.of("decoder_first"))


def decoder_step(vae: VideoDecoder, interface: Interface) -> Graph:
    return Graph("decoder_step", DecoderStep(vae), *interface.of("decoder_step"))


def with_caches(graph: Graph) -> Graph:
    """`graph` with the caches that its module, in the precision that it has now, reads and writes. Only decoders of
    videos have some."""
    if isinstance(graph.module, DecoderFirst):
        written = (spec(f"cache_{number:02d}", *kind) for number, kind in enumerate(_caches(graph.module.vae, False)))
        return replace(graph, outputs=(*written, *graph.outputs))
    if isinstance(graph.module, DecoderStep):
        kinds = list(enumerate(_caches(graph.module.vae, later=True)))
        read = (spec(f"cache_{number:02d}", *kind) for number, kind in kinds)
        written = (spec(f"cache_{number:02d}_next", *kind) for number, kind in kinds)
        return replace(graph, inputs=(*graph.inputs, *read), outputs=(*written, *graph.outputs))
    return graph


def _caches(vae: VideoDecoder, later: bool) -> list[tuple[Shape, str]]:
    """Shapes and types of the caches that the first latent frame gives, or a `later` one.

    They come from a run of the decoder itself: with latents of one pixel, its sizes are the factors.
    """
    with torch.no_grad():
        pixel = torch.zeros(1, vae.config.z_dim, 1, 1, 1, device=next(vae.parameters()).device)
        _, caches = vae.decode_first(pixel)
        if later:
            _, caches = vae.decode_step(pixel, caches)
    sides = ((cache, _times(cache.shape[3], "height"), _times(cache.shape[4], "width")) for cache in caches)
    return [
        (("batch", cache.shape[1], cache.shape[2], height, width), str(cache.dtype).removeprefix("torch."))
        for cache, height, width in sides
    ]


def _times(factor: int, symbol: str) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"
