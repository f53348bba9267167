"""The denoising loop: noise -> latents, with the flow head running several times on the features of one backbone pass.

Not a sampler library: the one rule `transition` of TMD; models without inner flow have `velocity_loop.py`. All buffers
are allocated and bound to the engines when the loop is made for a shape; after that a step sets two scalars and runs,
and nothing is allocated. On a device the buffers are the device's (tmd_engines.device.array): nothing but noise and
scalars is copied there, and an engine that can makes one launch of the backbone and all inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..clock import Timings, check_finite
from .noise import NoiseStream
from .schedule import rope_tables, shift_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tmd_engines import Engine, Manifest, Step

    from ..settings import Settings


def data_estimate(x: NDArray[Any], velocity: NDArray[Any], t: float) -> NDArray[np.float32]:
    """x - t·v as a new array on the host: the data that x at time t and the velocity noise - data say together."""
    estimate: NDArray[np.float32] = x.astype(np.float32) - np.float32(t) * velocity.astype(np.float32)
    return estimate


class BoundBackbone:
    """The backbone tied to buffers for latents of `latent_shape` and prompts of `text_tokens` tokens.

    `step` runs it on `x`, `t` and `prompt_embeds`. `handed` (features, context) and `rope` are for the flow head;
    `dims` are the sizes behind the symbols of both graphs.
    """

    def __init__(
        self, backbone: Engine, manifest: Manifest, latent_shape: tuple[int, int, int, int, int], text_tokens: int
    ) -> None:
        batch, _, frames, height, width = latent_shape
        pt, ph, pw = manifest.model.patch_size
        grid = (frames // pt, height // ph, width // pw)
        self.dims = {"batch": batch, "frames": frames, "height": height, "width": width}
        self.dims |= {"tokens": grid[0] * grid[1] * grid[2], "text": text_tokens}
        self.x, self.t, self.prompt_embeds = (backbone.empty(name, **self.dims) for name in ("x", "t", "prompt_embeds"))
        self.rope = {name: backbone.empty(name, **self.dims) for name in ("rope_cos", "rope_sin")}
        for buffer, table in zip(self.rope.values(), rope_tables(*grid, manifest.model.head_dim), strict=True):
            buffer[...] = table
        self.handed = {name: backbone.empty(name, **self.dims) for name in ("features", "context")}
        given = {"x": self.x, "t": self.t, "prompt_embeds": self.prompt_embeds, **self.rope}
        self.step = backbone.bind(given, self.handed)


class _Recorded(NamedTuple):
    """An outer step kept by an engine as one launch: `inner` inner steps; `share` of the time is the backbone's."""

    launch: Step
    inner: int
    share: float
    kept: object  # what the launch reads


class DenoiseLoop:
    """Backbone and flow head bound to buffers for latents of `latent_shape` and prompts of `text_tokens` tokens."""

    def __init__(
        self,
        backbone: Engine,
        flow_head: Engine,
        manifest: Manifest,
        latent_shape: tuple[int, int, int, int, int],
        text_tokens: int,
    ) -> None:
        if manifest.sampler.rule != "transition":
            raise ValueError(f"this loop is for TMD students, and the bundle's rule is {manifest.sampler.rule}")
        self._sampler = manifest.sampler
        bound = BoundBackbone(backbone, manifest, latent_shape, text_tokens)
        dims, self._x, self._t, self._prompt = bound.dims, bound.x, bound.t, bound.prompt_embeds
        self._features, self._backbone = bound.handed["features"], bound.step
        self._engines, self._dims = (backbone, flow_head), dims
        self._recorded: _Recorded | None = None

        self._noise, self._s, self._r = (flow_head.empty(name, **dims) for name in ("noise", "s", "r"))
        # The flow head reads one y and writes the other; its first step reads the noise itself, which saves a copy.
        self._y: list[NDArray[Any]] = [flow_head.empty("y_next", **dims) for _ in range(2)]
        self._given = {"noise": self._noise, **bound.handed, **bound.rope}
        self._ways = ((self._noise, self._y[0]), (self._y[0], self._y[1]), (self._y[1], self._y[0]))
        self._start, *self._turns = [self._bind(way, self._s, self._r) for way in self._ways]

    def _bind(self, way: tuple[Any, Any], s: Any, r: Any) -> Step:
        """The flow head from one buffer into another, at the times that `s` and `r` hold."""
        y, y_next = way
        return self._engines[1].bind({"y": y, "s": s, "r": r, **self._given}, {"y_next": y_next})

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, T, H, W]` float32 in the model's normalised space, for `prompt_embeds` `[1, text, E]`.

        A student has no guidance, so `negative_embeds` play no part. `on_preview` gets, in every step but the last,
        x - t·y: where this transition's velocity leads at time 0. Raises Cancelled if the callback says so,
        RuntimeFailure if a stage gives NaN or Inf.
        """
        outer, inner = settings.steps, settings.inner_steps
        t = shift_grid(outer, self._sampler.shift, self._sampler.t_max)
        s = shift_grid(inner, self._sampler.inner_shift, self._sampler.t_max)
        stream = NoiseStream(settings.seed)
        with timings.stage("noise"):
            self._prompt[...] = prompt_embeds
            self._x[...] = stream.normal(self._x.shape)
        for i in range(outer, 0, -1):
            done = outer - i
            if self._recorded is not None and self._recorded.inner == inner:
                with timings.stage("noise"):
                    self._noise[...] = stream.normal(self._noise.shape)
                self._t[...] = t[i]
                self._launch(self._recorded, done, outer, timings)
                y = self._y[(inner - 1) % 2]
            else:
                before = dict(timings.seconds)
                start = perf_counter()
                self._t[...] = t[i]
                self._backbone()
                check_finite("backbone", self._features)
                seconds = perf_counter() - start
                timings.add("backbone", seconds)
                timings.report("backbone", done + 1, outer, seconds)

                with timings.stage("noise"):
                    self._noise[...] = stream.normal(self._noise.shape)
                y = self._transition(s, done * inner, outer * inner, timings)
                if self._engines[0].records:
                    self._recorded = self._record(s, before, timings.seconds)
            if on_preview is not None and i > 1:
                on_preview(data_estimate(self._x, y, t[i]))
            with timings.stage("flow_head"):
                # y is not needed any more: it holds the product, so that the update allocates nothing.
                np.multiply(y, np.float32(t[i] - t[i - 1]), out=y)
                np.subtract(self._x, y, out=self._x)
                check_finite("flow_head", self._x)
        latents: NDArray[np.float32] = self._x.astype(np.float32)
        return latents

    def _record(self, s: NDArray[np.float64], before: dict[str, float], after: dict[str, float]) -> _Recorded:
        """An outer step as one launch. `before` and `after` are the timings around the one that has just run."""
        times = [tuple(self._engines[1].empty(name, **self._dims) for name in ("s", "r")) for _ in s[1:]]
        steps = []
        for k, (s_k, r_k) in enumerate(times):
            s_k[...], r_k[...] = s[len(times) - k], s[len(times) - k - 1]
            steps.append(self._bind(self._ways[(k - 1) % 2 + 1 if k else 0], s_k, r_k))

        def work() -> None:
            for step in (self._backbone, *steps):
                step()

        took = [after[stage] - before.get(stage, 0.0) for stage in ("backbone", "flow_head")]
        return _Recorded(self._engines[0].record(work), len(steps), took[0] / sum(took), (times, steps))

    def _launch(self, recorded: _Recorded, done: int, outer: int, timings: Timings) -> None:
        """A recorded outer step. It is timed whole: its stages get the shares that they had in the one before it."""
        start = perf_counter()
        recorded.launch()
        check_finite("backbone", self._features)
        seconds = perf_counter() - start
        for stage, share, calls in (("backbone", recorded.share, 1), ("flow_head", 1 - recorded.share, recorded.inner)):
            timings.add(stage, seconds * share)
            timings.report(stage, (done + 1) * calls, outer * calls, seconds * share)

    def _transition(self, s: NDArray[np.float64], done: int, total: int, timings: Timings) -> NDArray[Any]:
        """The inner flow of one outer step; returns the buffer that holds the velocity y."""
        inner = len(s) - 1
        for k in range(inner):
            start = perf_counter()
            self._s[...] = s[inner - k]
            self._r[...] = s[inner - k - 1]
            step = self._turns[(k - 1) % 2] if k else self._start
            step()
            seconds = perf_counter() - start
            timings.add("flow_head", seconds)
            timings.report("flow_head", done + k + 1, total, seconds)
        return self._y[(inner - 1) % 2]
