"""The denoising loop of models without inner flow (kind "wan"): one velocity per step, or two with guidance.

The same two graphs as for a student: the features of the backbone go straight into the rest of the transformer. As in
`loop.py`, everything of size is allocated and bound when the loop is made for a shape.
"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ..clock import check_finite
from .noise import NoiseStream
from .rules import RULES
from .schedule import told_time
from .tmd import BoundBackbone, data_estimate

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest

    from ..clock import Timings
    from ..settings import Settings
    from .rules import Rule


class VelocityLoop:
    """Both graphs bound to buffers for latents of `latent_shape` and prompts of `text_tokens` tokens."""

    def __init__(
        self,
        backbone: Engine,
        flow_head: Engine,
        manifest: Manifest,
        latent_shape: tuple[int, int, int, int, int],
        text_tokens: int,
    ) -> None:
        bound = BoundBackbone(backbone, manifest, latent_shape, text_tokens)
        self._x, self._t, self._prompt = bound.x, bound.t, bound.prompt_embeds
        self._features, self._backbone = bound.handed["features"], bound.step
        self._velocity = flow_head.empty("velocity", **bound.dims)
        given = {"x": self._x, "t": self._t, **bound.rope, **bound.handed}
        self._flow_head = flow_head.bind(given, {"velocity": self._velocity})
        # Both passes of guidance go through one binding: a second one would cost an engine's working memory again.
        self._empty = partial(flow_head.empty, "velocity", **bound.dims)
        self._negative: Any = None  # velocity of the first of them
        self._rule: Rule = RULES[manifest.sampler.rule](latent_shape, self._empty)

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, T, H, W]` float32 in the model's normalised space, for `prompt_embeds` `[1, text, E]`.

        With `negative_embeds`, of the same shape, v = v_neg + settings.guidance·(v_pos - v_neg). `on_preview` gets, in
        every step but the last, x - t·v: what each of the rules would give if this step were the last. Raises
        Cancelled if the callback says so, RuntimeFailure if a stage gives NaN or Inf.
        """
        passes = 1 if negative_embeds is None else 2
        if negative_embeds is not None and self._negative is None:
            self._negative = self._empty()
        stream = NoiseStream(settings.seed)
        with timings.stage("noise"):
            self._prompt[...] = prompt_embeds
            self._x[...] = stream.normal(self._x.shape)
            if settings.init_scale != 1:
                np.multiply(self._x, settings.init_scale, out=self._x)
            self._rule.start(settings.times, stream)
        total = settings.steps * passes
        v = self._velocity
        for i in range(settings.steps):
            self._t[...] = told_time(settings.times[i], settings.time_rounding)
            if negative_embeds is not None:
                self._prompt[...] = negative_embeds
                self._pass(2 * i + 1, total, timings)
                self._negative[...] = v
                self._prompt[...] = prompt_embeds
            self._pass((i + 1) * passes, total, timings)
            with timings.stage("noise" if self._rule.draws else "flow_head"):
                if negative_embeds is not None:
                    np.subtract(v, self._negative, out=v)
                    np.multiply(v, settings.guidance, out=v)
                    np.add(v, self._negative, out=v)
            if on_preview is not None and i + 1 < settings.steps:
                on_preview(data_estimate(self._x, v, settings.times[i]))
            with timings.stage("noise" if self._rule.draws else "flow_head"):
                self._rule.step(i, self._x, v)
            check_finite("flow_head", self._x)
        latents: NDArray[np.float32] = self._x.astype(np.float32)
        return latents

    def _pass(self, done: int, total: int, timings: Timings) -> None:
        """Both graphs on what the buffers hold."""
        for stage, step in (("backbone", self._backbone), ("flow_head", self._flow_head)):
            start = perf_counter()
            step()
            if stage == "backbone":
                check_finite(stage, self._features)
            seconds = perf_counter() - start
            timings.add(stage, seconds)
            timings.report(stage, done, total, seconds)
