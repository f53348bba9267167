"""What the VAE of Wan2.2-TI2V-5B adds to that of Wan2.1: shortcuts around its stages, and patches of pixels.

None of it has weights. `tmd_ref.vae` builds both VAEs from the same layers. Source: wan/modules/vae2_2.py of Wan2.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


class AverageDown(nn.Module):
    """The shortcut of an encoder's stage: `[B,C,1+t·k,s·H,s·W]` -> `[B,dim_out,1+k,H,W]`.

    The C·t·s² values that come to one place, channels slowest, are averaged in dim_out groups. `time` t and `space` s
    are 1 or 2. Zeros stand in for the frames before the first, so a first frame alone loses half of its size.
    """

    def __init__(self, dim_out: int, time: int, space: int) -> None:
        super().__init__()
        self.dim_out, self.time, self.space = dim_out, time, space

    def forward(self, x: Tensor) -> Tensor:
        t, s = self.time, self.space
        x = F.pad(x, (0, 0, 0, 0, t - 1, 0))
        batch, channels, frames, height, width = x.shape
        sides = frames // t, height // s, width // s
        x = x.reshape(batch * channels, sides[0], t, sides[1], s, sides[2], s)
        return x.permute(0, 2, 4, 6, 1, 3, 5).reshape(batch, self.dim_out, -1, *sides).mean(2)


class RepeatUp(nn.Module):
    """The shortcut of a decoder's stage: `[B,C,T,H,W]` -> `[B,dim_out,t·T,s·H,s·W]`.

    Each channel is repeated until there are dim_out·t·s² of them, which become channels, frames, rows and columns,
    channels slowest. The first latent frame of a video keeps the last of its t frames alone.
    """

    def __init__(self, dim_out: int, time: int, space: int) -> None:
        super().__init__()
        self.dim_out, self.time, self.space = dim_out, time, space

    def forward(self, x: Tensor, first: bool) -> Tensor:
        """`first`: x begins with the first latent frame."""
        t, s = self.time, self.space
        batch, channels, frames, height, width = x.shape
        repeats = self.dim_out * t * s * s // channels
        x = x[:, :, None].expand(-1, -1, repeats, -1, -1, -1)
        x = x.reshape(batch * self.dim_out, t, s, s, frames, height, width).permute(0, 4, 1, 5, 2, 6, 3)
        x = x.reshape(batch, self.dim_out, frames * t, height * s, width * s)
        return x[:, :, t - 1 :] if first else x


def to_patches(video: Tensor, patch: int) -> Tensor:
    """`[B,C,T,p·H,p·W]` -> `[B,C·p²,T,H,W]`: squares of pixels as channels, in the order (channel, column, row)."""
    if patch == 1:
        return video
    batch, channels, frames, height, width = video.shape
    x = video.reshape(batch * channels, frames, height // patch, patch, width // patch, patch).permute(0, 5, 3, 1, 2, 4)
    return x.reshape(batch, channels * patch * patch, frames, height // patch, width // patch)


def from_patches(x: Tensor, patch: int, columns_first: bool = True) -> Tensor:
    """The inverse of `to_patches`; without `columns_first` of the order (channel, row, column)."""
    if patch == 1:
        return x
    batch, channels, frames, height, width = x.shape
    channels //= patch * patch
    row, column = (2, 1) if columns_first else (1, 2)
    video = x.reshape(batch * channels, patch, patch, frames, height, width).permute(0, 3, 4, row, 5, column)
    return video.reshape(batch, channels, frames, height * patch, width * patch)
