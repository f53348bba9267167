"""TAEHV, a tiny decoder for the latents of Wan2.1 (`taew2_1`, `lighttaew2_1`) and of Wan2.2-TI2V-5B (`taew2_2`,
`lighttaew2_2`): for Wan2.1 a twentieth of the operations of Wan's own.

The decoder only, in the parameter names of the published files. Its convolutions are two-dimensional; time passes
through nine blocks that see the frame before, so it decodes one latent frame at a time with nine caches, in the same
interface as `tmd_ref.vae.WanVAE`: normalised latents in, video in -1..1 out. Source: taehv.py of madebyollin/taehv,
whose own output is in 0..1.

Letters in shapes: B batch, C channels, T frames, H and W of the frame in work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import at_least_float32, cast_for, passed_on
from tmd_ref.vae import Nearest2x
from tmd_ref.vae22 import from_patches

BLOCKS = 3  # per stage; with the upsampling, the growth in time and a convolution a stage takes six places of the file


@dataclass(frozen=True)
class TAEHVConfig:
    """Sizes of a TAEHV decoder: one stage per entry of `time_growth`, each doubling height and width.

    `widths` has the channels of every stage and, last, of the output convolution; `time_growth` is frames out per frame
    in of each stage. The last convolution makes squares of `patch` x `patch` pixels.
    """

    z_dim: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    time_growth: tuple[int, ...] = (1, 2, 2)
    patch: int = 1

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, after the first."""
        return math.prod(self.time_growth)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch << len(self.time_growth)


TAEHV_CONFIGS = {"wan2.1": TAEHVConfig(), "wan2.2": TAEHVConfig(z_dim=48, patch=2)}


class MemBlock(nn.Module):
    """Three convolutions over a frame and the frame before it, plus the frame; ReLU at the end."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x `[B,T,C,H,W]`, past `[B,1,C,H,W]`: the frame before the first of x. Returns `[B,T,C,H,W]`."""
        past = past.to(x.dtype)
        before = past if x.shape[1] == 1 else torch.cat([past, x[:, :-1]], dim=1)
        joined = torch.cat([x, before], dim=2)
        return F.relu(per_frame(self.conv, joined) + x)


class TimeGrowth(nn.Module):
    """One frame to `growth` frames by a 1x1 convolution whose channels are the frames, one after the other."""

    def __init__(self, dim: int, growth: int) -> None:
        super().__init__()
        self.growth = growth
        self.conv = nn.Conv2d(dim, dim * growth, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = per_frame(self.conv, x)
        return x if self.growth == 1 else x.unflatten(2, (self.growth, -1)).flatten(1, 2)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply an image layer to every frame of `[B,T,C,H,W]`."""
    return layer(x.flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[1]))


class TAEHV(nn.Module):
    """The decoder, with `decode`, `decode_first` and `decode_step` as `WanVAE` has them."""

    def __init__(self, config: TAEHVConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TAEHVConfig()
        # Keys are places in the published file's list, where layers without weights have places too.
        layers: dict[str, nn.Module] = {"1": nn.Conv2d(config.z_dim, config.widths[0], 3, padding=1)}
        for stage, growth in enumerate(config.time_growth):
            place, dim = _place(stage), config.widths[stage]
            layers |= {str(place + k): MemBlock(dim) for k in range(BLOCKS)}
            layers[str(place + BLOCKS + 1)] = TimeGrowth(dim, growth)
            layers[str(place + BLOCKS + 2)] = nn.Conv2d(dim, config.widths[stage + 1], 3, padding=1, bias=False)
        layers[str(_place(len(config.time_growth)) + 1)] = nn.Conv2d(
            config.widths[-1], 3 * config.patch**2, 3, padding=1
        )
        self.decoder = nn.ModuleDict(layers)
        self.upsample = Nearest2x()

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B,z_dim,1+k,h,w]` -> video `[B,3,1+4k,H,W]` in -1..1."""
        video, caches = self.decode_first(latents[:, :, :1])
        chunks = [video]
        for k in range(1, latents.shape[2]):
            video, caches = self.decode_step(latents[:, :, k : k + 1], caches)
            chunks.append(video)
        return torch.cat(chunks, dim=2).clamp(-1, 1)

    def decode_first(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """First latent frame `[B,z_dim,1,h,w]` -> 1 video frame `[B,3,1,H,W]`, about -1..1 and not clamped, and the
        caches for `decode_step`."""
        return self._decode_chunk(latents, None)

    def decode_step(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Later latent frame -> 4 video frames `[B,3,4,H,W]`, unclamped, and the next caches (`[B,C,1,H,W]` each)."""
        return self._decode_chunk(latents, caches)

    def _decode_chunk(self, latents: Tensor, caches: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        past, kept = iter(caches or ()), []
        conv_in, *_, conv_out = self.decoder.values()
        x = per_frame(conv_in, 3 * torch.tanh(latents.transpose(1, 2) / 3)).relu()
        x = cast_for(self.decoder[str(_place(0))], x)
        last = len(self.config.time_growth) - 1
        for stage in range(last + 1):
            place = _place(stage)
            for k in range(BLOCKS):
                before = torch.zeros_like(x[:, :1]) if caches is None else next(past).transpose(1, 2)
                kept.append(passed_on(x[:, -1:].transpose(1, 2)))
                x = self.decoder[str(place + k)](x, before)
            # Of the first latent frame only the last picture counts (the published code drops the others, so that
            # 1 + k latents make 1 + 4k pictures), and from here on pictures do not see each other.
            only_last = caches is None and stage == last
            # The file has the growth behind the upsampling. A 1x1 convolution does not mind, and costs a quarter here.
            x = self.decoder[str(place + BLOCKS + 1)](x[:, -1:] if only_last else x)
            x = per_frame(self.upsample, x[:, -1:] if only_last else x)
            x = per_frame(self.decoder[str(place + BLOCKS + 2)], x)
        video = at_least_float32(per_frame(conv_out, cast_for(conv_out, x.relu()))).transpose(1, 2)
        return from_patches(video, self.config.patch, columns_first=False) * 2 - 1, kept


def _place(stage: int) -> int:
    """Place of the first block of a stage in the published list: clamp, convolution and ReLU come before them."""
    return 3 + (BLOCKS + 3) * stage
