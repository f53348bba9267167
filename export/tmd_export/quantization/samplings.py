"""The samplings of a calibration: whole runs of the runtime, with its loops, tokenizer and noise, on given engines.

What they start from comes from the runtime too: the prompts through the text encoder as it stands in the bundle. Models
without one get noise in the place of prompts, and models of classes some of their classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from tmd_engines import Bundle, Engine, Manifest
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine
from tmd_runtime.clock import Timings
from tmd_runtime.errors import RuntimeFailure
from tmd_runtime.sampling import Loop, family_of, resolve_settings
from tmd_runtime.sampling.family import FIRST_FRAME
from tmd_runtime.settings import Settings
from tmd_runtime.text.conditions import Conditions

from ..errors import ExportError
from ..families import ExportFamily

MAX_TOKENS = 256  # of latents to calibrate on; larger default ones are replaced by the `small_patches` of the family


FEW_STEPS = 6  # at most, of the samplings that a large model is calibrated on


class Condition(NamedTuple):
    """What one run is conditioned on: embeddings float32 `[1, text, E]` and, with guidance, those of the negative
    prompt; or the number of a class, int64 `[1]`, and that of none."""

    prompt: np.ndarray
    negative: np.ndarray | None
    label: int | None = None


class Samplings:
    """Runs of the model that `manifest` describes, on the engines of `backbone`, `flow_head` and `update`."""

    def __init__(self, manifest: Manifest, family: ExportFamily, engines: Mapping[str, Engine]) -> None:
        self._manifest, self._engines = manifest, engines
        self.latents = latent_size(manifest, family)
        self.counts = family.samplings(manifest.sampler)
        self._loop: tuple[int, Loop] | None = None  # rows of its prompts

    @property
    def default_steps(self) -> tuple[int, int]:
        """Steps and inner steps of a run by default."""
        sampler = self._manifest.sampler
        return sampler.steps, self._manifest.family.inner_steps(sampler) or 1

    @property
    def usual_steps(self) -> int:
        """The number of steps by default, or the nearest below it that there are samplings with."""
        known = {steps for steps, _ in self.counts}
        return max((steps for steps in known if steps <= self.default_steps[0]), default=min(known))

    def conditions(self, prompts: Sequence[str], encodes: Bundle | None, seed: int) -> list[Condition]:
        """One for each of `prompts`. `encodes`: the bundle of the text encoder; None: noise from `seed`, or classes.

        Raises ExportError for a prompt that cannot be encoded.
        """
        rng, classes = np.random.default_rng(seed), self._manifest.family.classes(self._manifest.model)
        guided = self._settings(seed, *self.default_steps, None if classes is None else 0).passes == 2
        if classes is not None:
            labels = rng.integers(0, classes, len(prompts))
            return [Condition(labels[k : k + 1], np.array([classes]), int(labels[k])) for k in range(len(prompts))]
        if encodes is None:
            text = self._manifest.text
            made = rng.standard_normal((len(prompts) + 1, 1, text.max_length, text.dim), np.float32)
            return [Condition(embeds, made[-1] if guided else None) for embeds in made[:-1]]
        return self._encoded(prompts, encodes, self._settings(seed, *self.default_steps, None))

    def run(self, condition: Condition, seed: int, steps: int, inner_steps: int) -> np.ndarray:
        """Latents `[1, C, T, h, w]` of a run in so many steps. Raises ExportError if it fails.

        A model that holds a picture as its first frame goes through it twice: the first frame that came out is held in
        the second run, because a held frame has activations of its own.
        """
        settings = self._settings(seed, steps, inner_steps, condition.label)
        rows = 1 if condition.label is not None else condition.prompt.shape[1]
        try:
            if self._loop is None or self._loop[0] != rows:
                backbone, flow_head, update = (self._engines[name] for name in ("backbone", "flow_head", "update"))
                self._loop = None
                family, shape = family_of(self._manifest), settings.latent_shape
                self._loop = rows, family.loop(backbone, flow_head, update, self._manifest, shape, rows)
            negative = condition.negative if settings.passes == 2 else None
            made = self._loop[1].run(condition.prompt, settings, Timings(), negative).latents
            if family_of(self._manifest).takes_picture(self._manifest) == FIRST_FRAME:
                self._loop[1].run(condition.prompt, settings, Timings(), negative, init=made[:, :, :1])
            return made
        except RuntimeFailure as error:
            raise ExportError(f"the calibration failed: {error}") from error

    def _settings(self, seed: int, steps: int, inner_steps: int, label: int | None) -> Settings:
        frames, height, width = self.latents
        stride = self._manifest.latents
        size = width * stride.spatial_stride, height * stride.spatial_stride
        video = 1 + (frames - 1) * stride.temporal_stride
        return resolve_settings(self._manifest, seed, steps, inner_steps, video, size, label=label)

    def _encoded(self, prompts: Sequence[str], bundle: Bundle, settings: Settings) -> list[Condition]:
        read, timings, found = Conditions(bundle), Timings(), []
        with OnnxRuntimeEngine(bundle, "text_encoder", "cpu", None, as_stored=True) as engine:
            for prompt in prompts:
                try:
                    embeds = read(prompt, None, None, settings, lambda: engine, timings, [])
                except RuntimeFailure as error:
                    raise ExportError(f"the prompt {prompt!r} cannot be calibrated on: {error}") from error
                found.append(Condition(*read.same_length(*embeds)))
        return found


def few(counts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of `counts` that a large model is calibrated on: the longest of at most `FEW_STEPS`, and the shortest.

    The longest goes through most times, also those of the shorter ones; the shortest has the longest steps.
    """
    ranked = sorted(counts, key=prod)
    return list(dict.fromkeys(([count for count in ranked if count[0] <= FEW_STEPS] or ranked[:1])[-1:] + ranked[:1]))


def latent_size(manifest: Manifest, family: ExportFamily) -> tuple[int, int, int]:
    """Frames, height and width of the latents that are sampled: the default ones if they are small enough."""
    video, latents, patch = manifest.video, manifest.latents, manifest.model.patch_size
    frames = 1 + (video.frames - 1) // latents.temporal_stride
    size = frames, video.height // latents.spatial_stride, video.width // latents.spatial_stride
    if prod(size) <= MAX_TOKENS * prod(patch):
        return size
    frames, height, width = (count * side for count, side in zip(family.small_patches, patch, strict=True))
    return frames, height, width
