"""The judge of stage 2: 3-D convolutions on features of the frozen teacher, one head per depth, five scales each.

The paper names the kind (Conv3D heads on unpatchified teacher features at three depths, 68 M parameters at 1.3B), not
the layers. These are the layers of FastGen's multiscale head, whose size at 1.3B is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_ref.ops import at_least_float32, rotary_operands
from tmd_ref.wan import WanConfig, WanTransformer, token_grid, unpatchify

SCALES = (1, 2, 4, 8, 16)  # average pooling of each branch
HIDDEN = 1024


class Branch(nn.Module):
    """1x1x1 convolution, pooling by `scale`, 3x3x3 convolution, mean over what is left; norm and leaky ReLU between."""

    def __init__(self, channels: int, width: int, scale: int, groups: int) -> None:
        super().__init__()
        self.scale = scale
        self.enter, self.enter_norm = nn.Conv3d(channels, width, 1), nn.GroupNorm(groups, width)
        self.conv, self.conv_norm = nn.Conv3d(width, width, 3, padding=1), nn.GroupNorm(groups, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, h, w]` to `[B, width]`. An axis shorter than the scale is pooled to one value."""
        h = F.leaky_relu(self.enter_norm(self.enter(x)), 0.2)
        if self.scale > 1:
            h = F.avg_pool3d(h, [min(self.scale, side) for side in h.shape[2:]])
        return F.leaky_relu(self.conv_norm(self.conv(h)), 0.2).mean(dim=(2, 3, 4))


class DiscriminatorHead(nn.Module):
    """The judgement at one depth: a logit, above 0 for real."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        groups = 32 if width % 32 == 0 else 1
        self.branches = nn.ModuleList(Branch(channels, width, scale, groups) for scale in SCALES)
        self.hidden, self.out = nn.Linear(len(SCALES) * width, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, T, h, w]` to `[B]`."""
        joined = torch.cat([branch(x) for branch in self.branches], dim=1)
        return self.out(F.leaky_relu(self.hidden(joined), 0.2)).squeeze(1)


class Discriminator(nn.Module):
    """One head per depth. `reduction` divides the width of the convolutions (1 at 1.3B: 67.9 M; 2 at 14B: 188 M).

    No dropout (FastGen has 0.1 before the last layer): all randomness of training is keyed by sample.
    """

    def __init__(self, config: WanConfig, depths: int = 3, reduction: int = 1) -> None:
        super().__init__()
        _, ph, pw = config.patch_size
        channels = config.dim // (ph * pw)
        self.heads = nn.ModuleList(DiscriminatorHead(channels, channels // reduction) for _ in range(depths))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Unpatchified features of each depth `[B, D/4, T, H, W]` to logits `[depths, B]`."""
        return at_least_float32(torch.stack([head(x) for head, x in zip(self.heads, features, strict=True)]))


def teacher_pass(
    teacher: WanTransformer, x: Tensor, t: Tensor, prompt_embeds: Tensor, rope: tuple[Tensor, Tensor],
    depths: Sequence[int] = (), skip: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """`WanTransformer.forward`, and what blocks number `depths` (from 0) give, laid out as latents.

    Returns the velocity `[B, 16, T, H, W]` and features `[B, D/4, T, H, W]`: the D values of a token fill its patch,
    channels fastest, as in Wan's output layer. Blocks in `skip` are left out (skip-layer guidance).
    """
    grid = token_grid(x, teacher.config.patch_size)
    operands = rotary_operands(*rope, x.shape[0])
    e, e0 = teacher.embed_time(t)
    context = teacher.embed_text(prompt_embeds)
    h = teacher.patchify(x)
    features = []
    for number, block in enumerate(teacher.blocks):
        if number not in skip:
            h = block(h, e0, context, operands)
        if number in depths:
            features.append(unpatchify(h, grid, teacher.config.patch_size))
    return teacher.unpatchify(teacher.head(h, e), grid), features


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Minimax log-likelihood, logits `[depths, B]`: -log D(real) - log(1 - D(fake)), averaged."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """Non-saturating: -log D(fake), averaged."""
    return F.softplus(-fake).mean()


def count_parameters(config: WanConfig, **options: Any) -> int:
    """Parameters of a discriminator, without making one."""
    with torch.device("meta"):
        return sum(p.numel() for p in Discriminator(config, **options).parameters())
