"""A decoder in int8: ranges and the table of its convolutions, from clips that its own encoder turned into latents.

Everything is measured on the torch module in float32 with the roundings of the written graph, because a decoder runs
whole there: the graphs of the first and of a later latent frame share its layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tmd_engines import Bundle
from tmd_ref.scenes import render, sample_scene
from tmd_ref.taehv import TAEHV

from ..errors import ExportError
from ..families.build import build
from ..graph_export import Tell
from ..graphs import accuracy
from ..parts import DECODERS
from ..sources.source import Source
from ..weights.precision import DTYPES
from ..weights.weights import Weights
from .calibration import Sensitivity
from .convolutions import FORMAT, convolutions, quantize_convolutions
from .passes import Pass
from .sensitivity import measure
from .weights import QuantizedWeights

CLIPS, HELD_OUT_CLIPS = 6, 2
FRAMES, SIZE = 9, 64  # of a clip: the first latent frame and two later ones
LATENT = 8  # height and width of latents without an encoder
_ENCODER = re.compile(r"^vae\.(encoder|conv1)\.")  # Wan's encoder, and the convolution behind it

Arrays = Mapping[str, np.ndarray]


class DecoderQuantizer:
    """The calibration of one decoder. `prepare` before the first use of anything else.

    Latents are those of rendered clips, by the encoder of the model's own VAE. Weights from a seed get normal noise:
    that is how latents are distributed in each channel, but for trained weights it is not enough. Ranges of the
    built-in decoder on noise gave clips an MS-SSIM of 0.975, those of clips 0.9997.
    """

    def __init__(self, source: Source, keep_layers: bool = True) -> None:
        self._source, self._keep_layers = source, keep_layers
        self._ranges: dict[str, float] = {}
        self._held_out = torch.empty(0)
        self.sensitivity: Sensitivity | None = None

    def prepare(self, tell: Tell) -> None:
        """Calibrates, if that has not been done. Raises ExportError."""
        if self.sensitivity is not None:
            return
        tell("calibrate")
        layers = set(convolutions(build(self._source, "decoder_step", "int8")[0].module))
        with torch.no_grad():
            vae = self._float32()
            if isinstance(vae, TAEHV):
                raise ExportError(
                    "OpenVINO 2026.4 cannot compile TAEHV in int8 (types of a Concat): choose --precision decoder=bf16."
                )
            clips = self._latents(0, CLIPS)
            self._held_out = self._latents(1 << 31, HELD_OUT_CLIPS)
            rounded = RoundedDecoder(vae, layers)
            self._ranges = rounded.find_ranges(clips)
            passes = [Pass({"latents": each[None].numpy()}, rounded.decode(each[None])) for each in self._held_out]
            table = (lambda: rounded.alone(passes, tell)) if self._keep_layers else None
            self.sensitivity = measure(rounded, passes, table, always=False, goal=FORMAT.budget)

    def quantize(self, model: Any, weights: Weights, part: str) -> QuantizedWeights:
        """Quantizes the traced graph `part` in place; returns what to write as its weights."""
        kept = self._sensitivity().kept
        return quantize_convolutions(model, weights, {k: v for k, v in self._ranges.items() if k not in kept})

    def measure(self, bundle: Bundle, part: str) -> accuracy.Accuracy:
        """The written graph `part` against float32 on clips held out, worst case."""
        found = self._sensitivity()
        info, cases = bundle.graph_info(part), []
        with torch.no_grad():
            vae = self._float32()
            module = {each: build(self._source, each)[0].module for each in DECODERS}
            for each in module.values():
                each.vae = vae
            for clip in self._held_out:
                z = clip[None]
                given: dict[str, Tensor] = {"latents": z[:, :, :1]}
                results = module["decoder_first"](*given.values())
                if part == "decoder_step":
                    caches = (spec.name for spec in info.inputs if spec.name.startswith("cache_"))
                    given = {"latents": z[:, :, 1:2], **dict(zip(caches, results[:-2], strict=True))}
                    results = module["decoder_step"](*given.values())
                expected = {spec.name: value.numpy() for spec, value in zip(info.outputs, results, strict=True)}
                sizes = {"batch": 1, "frames": 1, "height": z.shape[3], "width": z.shape[4]}
                inputs = {name: value.contiguous().numpy() for name, value in given.items()}
                cases.append(accuracy.Case(sizes, inputs, expected))
        where = "clips through the encoder" if self._source.trained else "normal latents"
        scope = f"{where}; video, relative L2 {found.chosen:.4f}; in bf16: {', '.join(found.kept) or 'none'}"
        measured = accuracy.measure(bundle, part, cases, as_stored=True)
        return replace(measured, scope=f"{measured.scope}, {scope}")

    def _sensitivity(self) -> Sensitivity:
        if self.sensitivity is None:
            raise RuntimeError("prepare() comes first")
        return self.sensitivity

    def _float32(self) -> Any:
        """The decoder with its weights."""
        graph, weights = build(self._source, "decoder_step")
        weights.drop_unused({name for name in weights.specs if not _ENCODER.match(name)})
        weights.fill(graph.module)
        return graph.module.vae

    def _latents(self, seed: int, count: int) -> Tensor:
        """Normalised latents `[count, C, T, h, w]`. Raises ExportError if nothing is there to make them with."""
        if not self._source.trained:
            generator = torch.Generator().manual_seed(seed)
            channels = self._source.latents_entry()["channels"]
            return torch.randn(count, channels, 3, LATENT, LATENT, generator=generator)
        graph, weights = build(self._source.encodes_with, "decoder_step")
        try:
            weights.fill(graph.module)
        except (ExportError, KeyError) as error:
            raise ExportError(
                f"a decoder in int8 is calibrated on clips, and there is no encoder to make latents of them ({error}): "
                "add a --checkpoint with the model's whole VAE, or choose --precision decoder=bf16."
            ) from None
        vae: Any = graph.module.vae
        rng = np.random.default_rng(seed)
        clips = np.stack([render(sample_scene(rng), FRAMES, (SIZE, SIZE)) for _ in range(count)])
        video = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return torch.cat([vae.encode(clip[None]) for clip in video])


class RoundedDecoder:
    """A float32 decoder that computes as its graphs do with some convolutions in int8."""

    def __init__(self, vae: nn.Module, names: Collection[str]) -> None:
        """`names`: of the layers in the module of a graph, "vae.decoder...." """
        self._vae: Any = vae
        self._layers: dict[str, Any] = {
            f"vae.{name}": layer for name, layer in vae.named_modules() if f"vae.{name}" in names
        }
        self._weights = {name: layer.weight.data for name, layer in self._layers.items()}
        self._ranges: dict[str, float] = {}

    def find_ranges(self, clips: Tensor) -> dict[str, float]:
        """Largest absolute input of every layer over the decoding of `clips`."""
        found = dict.fromkeys(self._layers, 0.0)

        def watch(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, given: tuple[Any, ...]) -> None:
                found[name] = max(found[name], float(given[0].abs().max()))

            return hook

        self._hooked(watch, self._layers, clips)
        self._ranges = found
        return found

    def decode(self, latents: Tensor) -> dict[str, np.ndarray]:
        """The video in float32, exact."""
        return {"video": self._vae.decode(latents).numpy()}

    def __call__(self, inputs: Arrays, kept: Collection[str]) -> dict[str, np.ndarray]:
        """The video with all layers in int8 but those `kept`."""
        dtype = DTYPES["int8"]

        def rounding(name: str) -> Callable[..., tuple[Any, ...]]:
            def hook(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
                return (FORMAT.rounded(given[0], FORMAT.headroom * self._ranges[name], dtype), *given[1:])

            return hook

        chosen = [name for name in self._layers if name not in kept]
        try:
            for name in chosen:
                self._layers[name].weight.data = FORMAT.rounded_weight(self._weights[name], dtype)
            return {"video": self._hooked(rounding, chosen, torch.from_numpy(inputs["latents"])).numpy()}
        finally:
            for name in chosen:
                self._layers[name].weight.data = self._weights[name]

    def alone(self, passes: list[Pass], tell: Tell) -> dict[str, float]:
        """Layer -> relative L2 error of the video of the first of `passes` with that layer alone in int8."""
        inputs, outputs, _ = passes[0]
        size, found = float(np.linalg.norm(outputs["video"])), {}
        for done, name in enumerate(self._layers):
            tell("calibrate", done, len(self._layers))
            video = self(inputs, self._layers.keys() - {name})["video"]
            found[name] = float(np.linalg.norm(video - outputs["video"])) / size
        return found

    def _hooked(self, make: Callable[[str], Any], names: Collection[str], latents: Tensor) -> Tensor:
        hooks = [self._layers[name].register_forward_pre_hook(make(name)) for name in names]
        try:
            video: Tensor = self._vae.decode(latents)
            return video
        finally:
            for hook in hooks:
                hook.remove()
