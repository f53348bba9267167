"""Another decoder for a model's latents, from a file of its own (`--decoder FILE`), in the place of the model's VAE.

What the file is, names and shapes of its tensors tell: the VAE of Wan2.1 at any width (lightvae is that at a quarter)
or of Wan2.2-TI2V-5B, in its own layout or in that of diffusers, or TAEHV for either, whose names are places in a list.
Encoders in it are left aside. What cannot be told: TAEHV files for HunyuanVideo and CogVideoX have the tensors of one
for Wan2.1, and show wrong colours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from tmd_engines.bundle.files import sha256_hex
from tmd_engines.errors import quote
from tmd_ref.taehv import TAEHV, TAEHV_CONFIGS, TAEHVConfig
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE, WanVAEConfig

from ..checkpoints import Checkpoint, Tensors, open_tensors
from ..checkpoints.mapped import Codes
from ..checkpoints.names import bare
from ..errors import ExportError
from ..parts import MODEL_OF, VIDEO_PARTS, ordered
from .source import Source, on_meta
from .wrapped import Wrapped

_TAKE = (
    "For Wan2.1 take its own VAE (Wan2.1_VAE.pth), lightvaew2_1, or TAEHV (taew2_1 or lighttaew2_1); for "
    "Wan2.2-TI2V-5B Wan2.2_VAE.pth, or TAEHV (taew2_2 or lighttaew2_2)."
)
_ENCODER = re.compile(r"(encoder|conv1|quant_conv)\.")
_LISTED = 6


class Decoder(NamedTuple):
    """What a file holds: its sizes, its module, made on the meta device, and its weights by the names that they have
    there."""

    config: WanVAEConfig | TAEHVConfig
    make: Callable[[], nn.Module]
    read: Callable[[str], Tensor]


class WithDecoder(Wrapped):
    """The models of another source, but for the decoder, which is that of a file."""

    def __init__(self, source: Source, path: str | Path) -> None:
        """Raises ExportError if `path` cannot be read, is no decoder that is known here, or is one of other latents."""
        super().__init__(source)
        self._path = Path(path)
        decoders = {part for part in VIDEO_PARTS if MODEL_OF[part] == "vae"}
        # Of the file only the decoder is read, so nothing is there to encode a picture with.
        self.parts = ordered({*source.parts, *decoders} - {"encoder"})
        self.default_parts = ordered({*source.default_parts, *decoders} - {"encoder"})
        self.origin = f"{source.origin}; decoder {self._path.name}"
        if not self._path.is_file():
            raise ExportError(f"there is no file {path}: --decoder takes the weights of one decoder. {_TAKE}")
        self._decoder = read_decoder(self._path)

    def check(self, parts: tuple[str, ...]) -> None:
        super().check(_others(parts))
        self.origin = f"{self._inner.origin}; decoder {self._path.name}"  # which may have opened more by now
        config = self._decoder.config
        have = (config.z_dim, config.temporal_stride, config.spatial_stride)
        latents = self.latents_entry()
        want = tuple(latents[name] for name in ("channels", "temporal_stride", "spatial_stride"))
        if have != want:
            raise ExportError(
                f"{self._path} decodes latents of {have[0]} channels for {have[1]} frames of {have[2]}x{have[2]} "
                f"pixels, and this model's are of {want[0]} channels for {want[1]} frames of {want[2]}x{want[2]}: they "
                "do not belong together. Leave --decoder out."
            )

    def module(self, which: str) -> nn.Module:
        return on_meta(self._decoder.make) if which == "vae" else super().module(which)

    def tensor(self, which: str, name: str) -> Tensor:
        return self._decoder.read(name) if which == "vae" else super().tensor(which, name)

    def codes(self, which: str, name: str) -> Codes | None:
        return None if which == "vae" else super().codes(which, name)

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        found = super().sha256(_others(parts))
        if _others(parts) != parts:
            with open(self._path, "rb", buffering=0) as file:
                found[self._path.name] = sha256_hex(file)
        return found


def read_decoder(path: Path) -> Decoder:
    """The decoder in the file `path`. Raises ExportError that says what the file is instead, or all that it lacks."""
    tensors = open_tensors((path,))
    names = {bare(stored): stored for stored in tensors.entries}
    shapes = {name: tensors.entries[stored].shape for name, stored in names.items()}
    if any(re.match(r"decoder\.\d+\.", name) for name in names):
        config = _taehv_config(path, shapes)
        wanted = {name: tuple(weight.shape) for name, weight in on_meta(lambda: TAEHV(config)).state_dict().items()}
        _compare(path, {name: shape for name, shape in shapes.items() if not _ENCODER.match(name)}, wanted)
        return Decoder(config, lambda: TAEHV(config), lambda name: tensors.read(names[name]))
    return _wan_vae(path, tensors, shapes)


def _wan_vae(path: Path, tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> Decoder:
    width = shapes.get("decoder.head.0.gamma") or shapes.get("decoder.norm_out.gamma")
    latents = shapes.get("conv2.weight") or shapes.get("post_quant_conv.weight")
    if not width or not latents:
        shown = ", ".join(quote(name, 64) for name in list(shapes)[:_LISTED])
        raise ExportError(f"{path} holds no decoder that is known here: its tensors are called {shown}. {_TAKE}")
    known = {config.z_dim: config for name, config in WAN_VAE_CONFIGS.items() if name != "tiny"}
    if latents[0] not in known:
        raise ExportError(_other_latents(path, "a Wan VAE", latents[0]))
    whole = known[latents[0]]
    config = replace(whole, dim=width[0]) if whole.decoder_dim is None else replace(whole, decoder_dim=width[0])

    def make() -> nn.Module:
        model = WanVAE(config)
        del model.encoder, model.conv1
        return model

    tensors.entries = {name: entry for name, entry in tensors.entries.items() if not _ENCODER.match(bare(name))}
    checkpoint = Checkpoint(tensors)
    wanted = {name: tuple(weight.shape) for name, weight in on_meta(make).state_dict().items()}
    checkpoint.fit(wanted, f"the decoder at width {width[0]}")
    return Decoder(config, make, checkpoint.read)


def _taehv_config(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> TAEHVConfig:
    if "decoder.1.conv.0.weight" in shapes:
        raise ExportError(
            f"{path} is the large variant of TAEHV ('super'), which exists for other models only. {_TAKE}"
        )
    first = shapes.get("decoder.1.weight", ())
    known = {config.z_dim: config for config in TAEHV_CONFIGS.values()}
    if len(first) == 4 and first[1] not in known:
        raise ExportError(_other_latents(path, "a TAEHV decoder", first[1]))
    return known[first[1]] if len(first) == 4 else TAEHVConfig()


def _other_latents(path: Path, what: str, channels: int) -> str:
    model = {32: " (HunyuanVideo 1.5)", 128: " (LTX-Video)"}.get(channels, "")
    return f"{path} is {what} for latents of {channels} channels{model}, and Wan's have 16 or 48. {_TAKE}"


def _compare(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ExportError that lists every tensor that is missing, too much or of another shape."""
    problems = [f"{quote(name)} is missing" for name in wanted if name not in found]
    problems += [f"{quote(name)} is unexpected" for name in found if name not in wanted]
    problems += [
        f"{quote(name)} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ExportError(
            f"{path} does not fit TAEHV for Wan: {', '.join(problems[:_LISTED])}{more}. Copy it again; if that does "
            f"not help, it is another model. {_TAKE}"
        )


def _others(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in parts if MODEL_OF[part] != "vae")
