"""The autoencoder of a model of stills, from a folder as diffusers saves one: DC-AE or Stable Diffusion's VAE.

Layers and their names are diffusers' own. Some of them get another way to the same values (`dcae.py`, `sd_vae.py`),
because the graphs of a bundle may hold neither Resize, DepthToSpace and GroupNormalization nor a choice between two
formulas by the size of the picture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn

from tmd_engines.bundle.files import sha256_hex

from ..checkpoints import open_tensors
from ..errors import ExportError
from . import dcae, sd_vae
from .source import on_meta

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"

_FORWARDS = {"AutoencoderDC": dcae.FORWARDS, "AutoencoderKL": sd_vae.FORWARDS}
"""Class of diffusers -> name of a layer's class -> what it computes, in the operators of a bundle."""

# Of files older than diffusers 0.17: sd-vae-ft-ema is one.
_OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_FACTOR_TOLERANCE = 1e-3


class StillVAE(nn.Module):
    """Pictures `[B,3,1,s·H,s·W]` in -1..1 and latents as the transformer has them, `[B,C,1,H,W]`, times the factor."""

    def __init__(self, config: dict[str, Any], scaling_factor: float) -> None:
        """`config` is that of the folder; its `_class_name` says which autoencoder. Raises ExportError."""
        super().__init__()
        kind = config["_class_name"]
        if kind not in _FORWARDS:
            raise ExportError(f"{kind} is no autoencoder that is known here: {' and '.join(_FORWARDS)} are.")
        try:
            import diffusers
        except ImportError as error:
            raise ExportError(
                f"the autoencoder is taken from diffusers, which cannot be imported ({error}): pip install diffusers"
            ) from error
        made = getattr(diffusers, kind).from_config(config)
        self.encoder, self.decoder = made.encoder, made.decoder
        self.quant_conv, self.post_quant_conv = (
            getattr(made, name, None) or nn.Identity() for name in ("quant_conv", "post_quant_conv")
        )
        self.scaling_factor = scaling_factor
        self.latent_channels: int = made.config.latent_channels
        levels = made.config.get("decoder_block_out_channels") or made.config.block_out_channels
        self.spatial_stride = 1 << (len(levels) - 1)
        for layer in self.modules():
            forward = _FORWARDS[kind].get(type(layer).__name__)
            if forward is not None:
                layer.forward = MethodType(forward, layer)

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents; of a distribution over them its mean."""
        encoded: Tensor = self.quant_conv(self.encoder(pictures.squeeze(2)))
        return (encoded[:, : self.latent_channels] * self.scaling_factor).unsqueeze(2)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[B,3,1,H,W]`, about -1..1 and not clamped."""
        pictures: Tensor = self.decoder(self.post_quant_conv(latents.squeeze(2) / self.scaling_factor))
        return pictures.unsqueeze(2)


class VAEFolder:
    """A folder as diffusers saves an autoencoder: its configuration and its weights."""

    def __init__(self, folder: str | Path, factor: float) -> None:
        """`factor` is the scaling factor that the transformer was trained with. Raises ExportError."""
        self.folder, self.factor = Path(folder), factor
        for name in (CONFIG, WEIGHTS):
            if not (self.folder / name).is_file():
                raise ExportError(
                    f"{folder} has no {name}: --decoder takes the folder of an autoencoder as diffusers saves it "
                    "(dc-ae-f32c32-sana-1.1-diffusers, sd-vae-ft-ema)."
                )
        try:
            self.config: dict[str, Any] = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
            stated = self.config.get("scaling_factor")
            self.module()
        except ExportError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ExportError(f"{self.folder / CONFIG} is no configuration of an autoencoder ({error!r}).") from None
        # 1 is what diffusers writes where nobody said.
        if isinstance(stated, int | float) and stated != 1 and abs(stated / factor - 1) > _FACTOR_TOLERANCE:
            raise ExportError(
                f"{self.folder} scales its latents by {stated:g}, and this model was trained on latents scaled by "
                f"{factor:g}: it is another autoencoder. Take {self._wanted()}."
            )
        self._tensors = open_tensors((self.folder / WEIGHTS,))

    def module(self) -> StillVAE:
        made: StillVAE = on_meta(lambda: StillVAE(self.config, self.factor))  # type: ignore[assignment]
        return made

    def check(self, channels: int, stride: int) -> None:
        """Raises ExportError unless its latents have these `channels` and pixels, and the file has its weights."""
        module = self.module()
        have = module.latent_channels, module.spatial_stride
        if have != (channels, stride):
            raise ExportError(
                f"{self.folder} decodes latents of {have[0]} channels and {have[1]} pixels, and this model's are of "
                f"{channels} and {stride}: they do not belong together. Take {self._wanted()}."
            )
        for name, weight in module.state_dict().items():
            entry = self._tensors.entries.get(self._stored(name))
            if entry is None or tuple(entry.shape) != tuple(weight.shape):
                found = "nothing" if entry is None else list(entry.shape)
                raise ExportError(
                    f"{self.folder / WEIGHTS} has {found} as {name} where {list(weight.shape)} belongs: copy it again."
                )

    def tensor(self, name: str) -> Tensor:
        return self._tensors.read(self._stored(name))

    def sha256(self) -> dict[str, str]:
        with open(self.folder / WEIGHTS, "rb", buffering=0) as file:
            return {f"decoder {WEIGHTS}": sha256_hex(file)}

    def _stored(self, name: str) -> str:
        """How the file calls the weight `name`."""
        if name in self._tensors.entries:
            return name
        return re.sub("|".join(map(re.escape, _OLD_ATTENTION)), lambda found: _OLD_ATTENTION[found[0]], name)

    def _wanted(self) -> str:
        return "dc-ae-f32c32-sana-1.1-diffusers for tim-t2i and tim-c2i-512, sd-vae-ft-ema for tim-c2i-256"
