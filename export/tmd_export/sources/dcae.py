"""Layers of DC-AE (arXiv 2410.10733; diffusers' AutoencoderDC) in the operators of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tmd_ref.vae import Nearest2x


def _encoder(encoder: Any, x: Tensor) -> Tensor:
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        x = block(x)
    y: Tensor = encoder.conv_out(x)
    return y + _average(x, encoder.out_shortcut_average_group_size) if encoder.out_shortcut else y


def _down_block(block: Any, x: Tensor) -> Tensor:
    """DCDownBlock2d."""
    y: Tensor = block.conv(x)
    if block.downsample:
        y = _pixel_unshuffle(y)
    return y + _average(_pixel_unshuffle(x), block.group_size) if block.shortcut else y


def _up_block(block: Any, x: Tensor) -> Tensor:
    """DCUpBlock2d."""
    y: Tensor = block.conv(Nearest2x()(x)) if block.interpolate else _pixel_shuffle(block.conv(x))
    if not block.shortcut:
        return y
    batch, channels, height, width = x.shape
    repeated = x.unsqueeze(2).expand(-1, -1, block.repeats, -1, -1)
    return y + _pixel_shuffle(repeated.reshape(batch, channels * block.repeats, height, width))


def _average(x: Tensor, size: int) -> Tensor:
    """Every `size` channels to their mean."""
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels // size, size, height, width).sum(dim=2) / size


def _pixel_shuffle(x: Tensor) -> Tensor:
    """Four channels to two by two pixels."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, channels // 4, 2 * height, 2 * width)


def _pixel_unshuffle(x: Tensor) -> Tensor:
    """Two by two pixels to four channels."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return parts.reshape(batch, 4 * channels, height // 2, width // 2)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, tuple(norm.dim), norm.weight, norm.eps) + norm.bias


def _linear_attention(attention: Any, x: Tensor) -> Tensor:
    """SanaMultiscaleLinearAttention. For pictures of a few tokens diffusers multiplies keys with queries first, which
    is the same product in another order."""
    batch, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)
    parts = [layer(rows).permute(0, 3, 1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v)]
    qkv = torch.cat(parts, dim=1)
    scales = [qkv, *(scale(qkv) for scale in attention.to_qkv_multiscale)]
    heads = torch.cat(scales, dim=1).reshape(batch, -1, 3 * attention.attention_head_dim, height * width)
    query, key, value = heads.chunk(3, dim=2)
    query, key = query.relu(), key.relu()
    # The sum of the weights of each query, as one more row of values that are 1.
    total = key.sum(dim=3, keepdim=True).transpose(2, 3) @ query
    # diffusers adds eps; onnxscript's optimizer takes an addition of 1e-15 for one of zero and drops it, and a query
    # of zeros, which ReLU makes, is 0/0 then.
    mixed = (value @ key.transpose(2, 3)) @ query / total.clamp(min=attention.eps)
    out = attention.to_out(mixed.reshape(batch, -1, height, width).permute(0, 2, 3, 1))
    out = attention.norm_out(out).permute(0, 3, 1, 2)
    return x + out if attention.residual_connection else out


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "Encoder": _encoder,
    "DCDownBlock2d": _down_block,
    "DCUpBlock2d": _up_block,
    "RMSNorm": _rms_norm,
    "SanaMultiscaleLinearAttention": _linear_attention,
}
