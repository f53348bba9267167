"""DC-AE's decoder (arXiv 2410.10733) as diffusers has it, made fit for export: the decoder of TiM's 32-fold latents.

The layers and their names are diffusers' own. Three of them get another way to the same values, because the graphs of
a bundle may not hold Resize, DepthToSpace or a choice between two formulas by the size of the picture.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tmd_engines.files import sha256_hex

from .checkpoints import open_tensors
from .errors import ExportError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

_SETTINGS = {
    "in_channels": "in_channels",
    "latent_channels": "latent_channels",
    "attention_head_dim": "attention_head_dim",
    "decoder_block_types": "block_type",
    "decoder_block_out_channels": "block_out_channels",
    "decoder_layers_per_block": "layers_per_block",
    "decoder_qkv_multiscales": "qkv_multiscales",
    "decoder_norm_types": "norm_type",
    "decoder_act_fns": "act_fn",
    "upsample_block_type": "upsample_block_type",
    "decoder_in_shortcut": "in_shortcut",
    "decoder_conv_act_fn": "conv_act_fn",
}
"""Name in AutoencoderDC's configuration -> name of the argument of its decoder."""


class DCAEDecoder(nn.Module):
    """Latents as the transformer has them, `[B,C,1,H,W]`, to pictures: divides by the scaling factor itself."""

    def __init__(self, config: dict[str, Any], scaling_factor: float) -> None:
        super().__init__()
        try:
            from diffusers.models.autoencoders.autoencoder_dc import Decoder
        except ImportError as error:
            raise ExportError(
                f"the decoder is taken from diffusers, which cannot be imported ({error}): pip install diffusers"
            ) from error
        self.decoder = Decoder(**{argument: config[name] for name, argument in _SETTINGS.items() if name in config})
        self.scaling_factor = scaling_factor
        self.latent_channels: int = config["latent_channels"]
        self.spatial_stride = 1 << (len(config["decoder_block_out_channels"]) - 1)
        for layer in self.decoder.modules():
            forward = _FORWARDS.get(type(layer).__name__)
            if forward is not None:
                layer.forward = MethodType(forward, layer)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[B,3,1,32·H,32·W]` in -1..1."""
        pictures: Tensor = self.decoder(latents.squeeze(2) / self.scaling_factor)
        return pictures.clamp(-1, 1).unsqueeze(2)


def _up_block(block: Any, x: Tensor) -> Tensor:
    """DCUpBlock2d."""
    y = block.conv(_nearest(x)) if block.interpolate else _pixel_shuffle(block.conv(x))
    if not block.shortcut:
        return y
    batch, channels, height, width = x.shape
    repeated = x.unsqueeze(2).expand(-1, -1, block.repeats, -1, -1)
    return y + _pixel_shuffle(repeated.reshape(batch, channels * block.repeats, height, width))


def _nearest(x: Tensor) -> Tensor:
    """Every value four times, twice as high and wide."""
    batch, channels, height, width = x.shape
    wide = x.unsqueeze(3).unsqueeze(5).expand(-1, -1, -1, 2, -1, 2)
    return wide.reshape(batch, channels, 2 * height, 2 * width)


def _pixel_shuffle(x: Tensor) -> Tensor:
    """Four channels to two by two pixels."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, channels // 4, 2 * height, 2 * width)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, tuple(norm.dim), norm.weight, norm.eps) + norm.bias


def _linear_attention(attention: Any, x: Tensor) -> Tensor:
    """SanaMultiscaleLinearAttention. For pictures of a few tokens diffusers multiplies keys with queries first, which
    is the same product in another order."""
    batch, _, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)
    asked = [layer(rows).permute(0, 3, 1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v)]
    qkv = torch.cat(asked, dim=1)
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


_FORWARDS = {"DCUpBlock2d": _up_block, "RMSNorm": _rms_norm, "SanaMultiscaleLinearAttention": _linear_attention}


class DCAEFolder:
    """A folder as diffusers saves an AutoencoderDC: its configuration and its weights."""

    def __init__(self, folder: str | Path, factor: float) -> None:
        """`factor` is the scaling factor where the configuration names none. Raises ExportError."""
        self.folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (self.folder / name).is_file():
                raise ExportError(
                    f"{folder} has no {name}: --decoder takes DC-AE's folder as diffusers saves it "
                    "(dc-ae-f32c32-sana-1.1-diffusers)."
                )
        try:
            self.config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            self.factor = float(self.config.get("scaling_factor") or factor)
            self.module()
        except ExportError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExportError(f"{self.folder / CONFIG} is no configuration of a DC-AE ({error!r}).") from None
        self._tensors = open_tensors((self.folder / WEIGHTS,))

    def module(self) -> DCAEDecoder:
        from .sources import on_meta

        made: DCAEDecoder = on_meta(lambda: DCAEDecoder(self.config, self.factor))  # type: ignore[assignment]
        return made

    def check(self, channels: int, stride: int) -> None:
        """Raises ExportError unless this decodes latents of `channels`, and the file has its weights."""
        module = self.module()
        have = module.latent_channels, module.spatial_stride
        if have != (channels, stride):
            raise ExportError(
                f"{self.folder} decodes latents of {have[0]} channels and {have[1]} pixels, and this model's are of "
                f"{channels} and {stride}: they do not belong together. Leave --decoder out."
            )
        for name, weight in module.state_dict().items():
            entry = self._tensors.entries.get(name)
            if entry is None or tuple(entry.shape) != tuple(weight.shape):
                found = "nothing" if entry is None else list(entry.shape)
                raise ExportError(
                    f"{self.folder / WEIGHTS} has {found} as {name} where {list(weight.shape)} belongs: copy it again."
                )

    def tensor(self, name: str) -> Tensor:
        return self._tensors.read(name)

    def sha256(self) -> dict[str, str]:
        with open(self.folder / WEIGHTS, "rb", buffering=0) as file:
            return {f"decoder {WEIGHTS}": sha256_hex(file)}
