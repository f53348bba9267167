"""Wan's causal video VAEs, decodable one latent frame at a time: 4 x 8 x 8 compression into 16 channels for Wan2.1, and
4 x 16 x 16 into 48 for Wan2.2-TI2V-5B.

Parameter names are those of the original checkpoints (`Wan2.1_VAE.pth`, `Wan2.2_VAE.pth`), so official weights load
unchanged. The network is written in its full-sequence form: a causal convolution pads time with zeros on the left, and
the first frame passes by the temporal resampling. Decoding frame by frame is the same code with a `History` that stands
in for the zeros; both forms give the same numbers. Source: wan/modules/vae.py of Wan2.1; facts on the equivalence in
docs/architecture.md. What the second VAE adds is in `tmd_ref.vae22`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import at_least_float32, attention, cast_for, passed_on
from tmd_ref.vae22 import WAN22_MEAN, WAN22_STD, AverageDown, RepeatUp, from_patches, to_patches

_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class WanVAEConfig:
    """Sizes of a Wan VAE. `latents_mean` and `latents_std` normalise each latent channel to about N(0, 1).

    Of Wan2.2's alone: the decoder is as wide as `decoder_dim` says (None: as the encoder), with `shortcuts` around each
    stage, and the stages see squares of `patch` x `patch` pixels as channels.
    """

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = _WAN_MEAN
    latents_std: tuple[float, ...] = _WAN_STD
    decoder_dim: int | None = None
    shortcuts: bool = False
    patch: int = 1

    @property
    def temporal_stride(self) -> int:
        """Video frames per latent frame, after the first."""
        return 1 << sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.patch << (len(self.dim_mult) - 1)


WAN_VAE_CONFIGS = {
    "wan2.1": WanVAEConfig(),
    "wan2.2": WanVAEConfig(
        dim=160,
        z_dim=48,
        latents_mean=WAN22_MEAN,
        latents_std=WAN22_STD,
        decoder_dim=256,
        shortcuts=True,
        patch=2,
    ),
    "tiny": WanVAEConfig(dim=8),
}


class History:
    """What the causal convolutions of one decoder keep between latent frames.

    `past` holds, in the order of execution, the last two input frames of each convolution; None before the first
    latent frame. `kept` collects the same for the next one.
    """

    def __init__(self, past: Sequence[Tensor] | None):
        self.first = past is None
        self._past = iter(past or ())
        self.kept: list[Tensor] = []

    def prepend(self, x: Tensor, frames: int) -> Tensor:
        """`[B,C,T,H,W]` -> `[B,C,frames+T,H,W]`: the kept frames (zeros at first) before `x`."""
        past = None if self.first else next(self._past).to(x.dtype)
        joined = F.pad(x, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat([past, x], dim=2)
        self.kept.append(joined[:, :, -frames:])
        return joined

    def skip(self, x: Tensor, frames: int) -> None:
        """Keep zeros: the first latent frame never enters the history of a temporal upsampling."""
        self.kept.append(torch.zeros_like(x[:, :, :1]).expand(-1, -1, frames, -1, -1))


class CausalConv3d(nn.Conv3d):
    """3-D convolution that sees no later frame: time padded on the left only, space symmetrically. Its input, and what
    it keeps of it, takes the precision of its weights."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int | tuple[int, int, int], pad: bool = True, **kw):
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        space = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(channels_in, channels_out, kernel, padding=space, **kw)
        self.past_frames = kernel[0] - 1 if pad else 0

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = cast_for(self, x)
        if self.past_frames:
            zeros = (0, 0, 0, 0, self.past_frames, 0)
            x = F.pad(x, zeros) if history is None else history.prepend(x, self.past_frames)
        return super().forward(x)


class RMSNorm(nn.Module):
    """L2 normalisation over channels (dim 1) times sqrt(C) and a gain."""

    def __init__(self, dim: int, axes: int):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        # F.normalize(x, dim=1) with the same 1e-12; its vector_norm is several times slower on a CPU
        return x * torch.rsqrt(x.square().sum(dim=1, keepdim=True).clamp_min(1e-24)) * (self.scale * self.gamma)


def per_frame(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an image function `[N,C,H,W] -> [N,C',H',W']` to every frame of `[B,C,T,H,W]`."""
    batch, frames = x.shape[0], x.shape[2]
    return fn(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)


class ResidualBlock(nn.Module):
    """(norm, SiLU, causal 3x3x3) twice, plus the input."""

    def __init__(self, dim_in: int, dim_out: int):
        super().__init__()
        self.residual = nn.ModuleList([
            RMSNorm(dim_in, 3), nn.SiLU(), CausalConv3d(dim_in, dim_out, 3),
            RMSNorm(dim_out, 3), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(dim_out, dim_out, 3),
        ])  # fmt: skip
        self.shortcut = CausalConv3d(dim_in, dim_out, 1) if dim_in != dim_out else nn.Identity()

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        norm1, act1, conv1, norm2, act2, _, conv2 = self.residual
        h = conv1(act1(norm1(x)), history)
        return at_least_float32(self.shortcut(x)) + at_least_float32(conv2(act2(norm2(h)), history))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def _attend(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        h = cast_for(self.to_qkv, self.norm(x))
        q, k, v = self.to_qkv(h).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # [N,HW,C]
        out = attention(q, k, v, num_heads=1).transpose(1, 2)
        return at_least_float32(self.proj(out.unflatten(2, (height, -1))))

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        return x + per_frame(self._attend, x)


class PadRightBottom(nn.Module):
    """One row and column of zeros, as a stride-2 convolution of an even size needs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1, 0, 1))


class Nearest2x(nn.Module):
    """Repeat every pixel twice in both directions, by expand: Resize and GatherND are slow or refused in engines."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


class Downsample(nn.Module):
    """Half the height and width and, if `temporal`, frames 1 + 4k -> 1 + 2k (the first one untouched by time)."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(PadRightBottom(), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), pad=False, stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor) -> Tensor:
        x = per_frame(self.resample, cast_for(self.resample, x))
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Twice the height and width, `dim_out` channels and, if `temporal`, frames 1 + k -> 1 + 2k."""

    def __init__(self, dim: int, dim_out: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(Nearest2x(), nn.Conv2d(dim, dim_out, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = cast_for(self.resample, x)
        if self.time_conv is not None:
            if history is None:
                x = torch.cat([x[:, :, :1], _double(self.time_conv, x[:, :, 1:])], dim=2) if x.shape[2] > 1 else x
            elif history.first:
                history.skip(x, self.time_conv.past_frames)
            else:
                x = _double(self.time_conv, x, history)
        return per_frame(self.resample, x)


def _double(time_conv: CausalConv3d, x: Tensor, history: History | None = None) -> Tensor:
    """`[B,C,T,H,W]` -> `[B,C,2T,H,W]`: the two halves of the convolution's channels are frames 2t and 2t+1."""
    even, odd = time_conv(x, history).chunk(2, dim=1)
    return torch.stack([even, odd], dim=3).flatten(2, 3)


class DownStage(nn.Module):
    """A stage of an encoder with a shortcut around it."""

    def __init__(self, layers: list[nn.Module], shortcut: AverageDown):
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.downsamples:
            h = layer(h)
        return at_least_float32(h) + self.shortcut(x)


class UpStage(nn.Module):
    """A stage of a decoder, with a shortcut around it if it makes the video larger."""

    def __init__(self, layers: list[nn.Module], shortcut: RepeatUp | None):
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.shortcut = shortcut

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        h = x
        for layer in self.upsamples:
            h = layer(h, history)
        if self.shortcut is None:
            return h
        return at_least_float32(h) + self.shortcut(x, first=history is None or history.first)


class Encoder(nn.Module):
    """Video `[B,3,1+4k,H,W]` -> `[B,2*z_dim,1+k,h,w]`."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.patch = config.patch
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        self.conv1 = CausalConv3d(3 * config.patch**2, dims[0], 3)
        layers: list[nn.Module] = []
        for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
            smaller = level < len(config.dim_mult) - 1
            temporal = smaller and config.temporal_downsample[level]
            stage: list[nn.Module] = []
            for _ in range(config.num_res_blocks):
                stage.append(ResidualBlock(dim_in, dim_out))
                dim_in = dim_out
            if smaller:
                stage.append(Downsample(dim_out, temporal))
            shortcut = AverageDown(dim_out, 1 + temporal, 1 + smaller)
            layers += [DownStage(stage, shortcut)] if config.shortcuts else stage
        self.downsamples = nn.ModuleList(layers)
        self.middle = nn.ModuleList(
            [ResidualBlock(dim_out, dim_out), AttentionBlock(dim_out), ResidualBlock(dim_out, dim_out)]
        )
        self.head = nn.ModuleList([RMSNorm(dim_out, 3), nn.SiLU(), CausalConv3d(dim_out, 2 * config.z_dim, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(to_patches(x, self.patch))
        for layer in (*self.downsamples, *self.middle, *self.head):
            x = layer(x)
        return x


class Decoder(nn.Module):
    """Latents `[B,z_dim,1+k,h,w]` -> video `[B,3,1+4k,H,W]`; with a `History`, the frames of one latent frame."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.patch = config.patch
        dim = config.decoder_dim or config.dim
        dims = [dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        self.conv1 = CausalConv3d(config.z_dim, dims[0], 3)
        self.middle = nn.ModuleList(
            [ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]), ResidualBlock(dims[0], dims[0])]
        )
        layers: list[nn.Module] = []
        for level, (dim_in, dim_out) in enumerate(pairwise(dims)):
            if level > 0 and not config.shortcuts:
                dim_in //= 2  # halved by the upsampling before
            larger = level < len(config.dim_mult) - 1
            temporal = larger and config.temporal_downsample[::-1][level]
            stage: list[nn.Module] = []
            for _ in range(config.num_res_blocks + 1):
                stage.append(ResidualBlock(dim_in, dim_out))
                dim_in = dim_out
            if larger:
                stage.append(Upsample(dim_out, dim_out if config.shortcuts else dim_out // 2, temporal))
            shortcut = RepeatUp(dim_out, 1 + temporal, 2) if larger else None
            layers += [UpStage(stage, shortcut)] if config.shortcuts else stage
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleList([RMSNorm(dim_out, 3), nn.SiLU(), CausalConv3d(dim_out, 3 * config.patch**2, 3)])

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = self.conv1(x, history)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, history)
        norm, act, conv = self.head
        return from_patches(conv(act(norm(x)), history), self.patch)


class WanVAE(nn.Module):
    """The VAE in the sampler's space: `encode` returns and `decode` takes normalised latents."""

    def __init__(self, config: WanVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def _constant(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

    def posterior(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unnormalised latents, `[B,z_dim,1+k,h,w]` each."""
        frames, height, width = video.shape[2:]
        time, space = self.config.temporal_stride, self.config.spatial_stride
        if (frames - 1) % time or height % space or width % space:
            raise ValueError(
                f"a video of {frames} frames at {width}x{height} cannot be encoded: "
                f"it takes {time}k+1 frames, height and width divisible by {space}"
            )
        mean, log_variance = self.conv1(self.encoder(video)).chunk(2, dim=1)
        return mean, log_variance

    def normalise(self, z: Tensor) -> Tensor:
        """Latents as encoded -> latents of the sampler, about N(0, 1) per channel."""
        return (z - self._constant(self.config.latents_mean, z)) / self._constant(self.config.latents_std, z)

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latents * self._constant(self.config.latents_std, latents) + self._constant(
            self.config.latents_mean, latents
        )

    def encode(self, video: Tensor) -> Tensor:
        """Video `[B,3,1+4k,H,W]` in -1..1 -> normalised latents `[B,z_dim,1+k,h,w]`, the posterior's mean."""
        return self.normalise(self.posterior(video)[0])

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents `[B,z_dim,1+k,h,w]` -> video `[B,3,1+4k,H,W]` in -1..1."""
        return self.decoder(self._unpack(latents)).clamp(-1, 1)

    def decode_first(self, latents: Tensor) -> tuple[Tensor, list[Tensor]]:
        """First latent frame `[B,z_dim,1,h,w]` -> 1 video frame `[B,3,1,H,W]`, about -1..1 and not clamped, and the
        caches for `decode_step`."""
        return self._decode_chunk(latents, None)

    def decode_step(self, latents: Tensor, caches: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Later latent frame -> 4 video frames `[B,3,4,H,W]`, unclamped, and the next caches (`[B,C,2,H,W]` each)."""
        return self._decode_chunk(latents, caches)

    def _decode_chunk(self, latents: Tensor, caches: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        history = History(caches)
        video = self.decoder(self._unpack(latents), history)
        return video, [passed_on(cache) for cache in history.kept]

    def _unpack(self, latents: Tensor) -> Tensor:
        """conv2(denormalise(latents)) as one convolution: W(std·z + mean) + b = (W·std)z + (W·mean + b), exactly.

        An engine folds the weights when it loads the graph; what is left of the normalisation costs nothing.
        """
        mean, std = (self._constant(v, self.conv2.weight) for v in (self.config.latents_mean, self.config.latents_std))
        return F.conv3d(latents, self.conv2.weight * std, self.conv2(mean).flatten())
