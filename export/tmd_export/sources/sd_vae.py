"""Layers of Stable Diffusion's VAE (arXiv 2112.10752; diffusers' AutoencoderKL) in the operators of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tmd_ref.ops import attention
from tmd_ref.vae import Nearest2x


def _group_norm(norm: Any, x: Tensor) -> Tensor:
    """GroupNorm of `[B,C,...]`. The mean first, then the squares around it: both at once would cancel."""
    groups = x.reshape(x.shape[0], norm.num_groups, -1)
    count = groups.shape[2]
    centred = groups - groups.sum(dim=2, keepdim=True) / count
    variance = (centred * centred).sum(dim=2, keepdim=True) / count
    shape = (1, -1, *(1,) * (x.dim() - 2))
    unit = (centred * (variance + norm.eps).rsqrt()).reshape(x.shape)
    scaled: Tensor = unit * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    return scaled


def _upsample(layer: Any, x: Tensor, *_: Any) -> Tensor:
    """Upsample2D."""
    up: Tensor = layer.conv(Nearest2x()(x))
    return up


def _attention(layer: Any, x: Tensor, **_: Any) -> Tensor:
    """Attention over all pixels `[B,C,H,W]`."""
    tokens = layer.group_norm(x.flatten(2)).transpose(1, 2)
    mixed = attention(layer.to_q(tokens), layer.to_k(tokens), layer.to_v(tokens), layer.heads)
    out: Tensor = x + layer.to_out[0](mixed).transpose(1, 2).reshape(x.shape)
    return out


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "GroupNorm": _group_norm,
    "Upsample2D": _upsample,
    "Attention": _attention,
}
