"""A small family of models that only the tests know: what its bundle says, its network, its export and its loop.

Nothing shared is changed for it: each part gets an object of its registry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tmd_engines import Engine, Manifest
from tmd_engines.bundle.families import Calls, Family
from tmd_engines.bundle.families.rules import RULES
from tmd_engines.bundle.families.signature import LATENTS, PASSED, TIME, Signature, update_signature
from tmd_engines.bundle.families.signature import Tensor as Stated
from tmd_engines.bundle.sections import SamplerInfo
from tmd_export.families import ExportFamily, Request
from tmd_export.graphs.graph import Graph, Interface
from tmd_export.presets import Preset
from tmd_export.sources.decoders import WithDecoder
from tmd_export.sources.random_weights import random_tensor
from tmd_export.sources.source import Source, on_meta
from tmd_runtime.clock import Timings
from tmd_runtime.sampling import Denoised, RuntimeFamily
from tmd_runtime.sampling.calls import Call, Draws, Launches
from tmd_runtime.sampling.calls import Calls as Counted
from tmd_runtime.sampling.family import LatentShape, common_settings
from tmd_runtime.sampling.schedule import uniform_times
from tmd_runtime.sampling.update import Updater
from tmd_runtime.settings import Settings, Wishes

DIM, CHANNELS = 32, 16

# What a bundle of the family says.


class DriftSampler(SamplerInfo):
    rule: Literal["euler"]


class Drift(Family):
    """Each latent drifts by itself: features once per step, then the velocity."""

    name = "drift"
    sampler = DriftSampler
    graphs = {  # noqa: RUF012
        "backbone": Signature({"x": LATENTS, "t": TIME}, {"features": Stated(PASSED)}),
        "flow_head": Signature({"features": Stated(PASSED)}, {"velocity": LATENTS}),
        "update": update_signature(LATENTS),
    }

    def passes(self, sampler: DriftSampler) -> int:
        return 1

    def calls(self, steps: int, inner_steps: int, passes: int) -> Calls:
        return Calls(steps, steps)

    def describe(self, sampler: DriftSampler) -> str:
        return f"{sampler.rule}: {sampler.steps} steps"


# The network.


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In the type of the layer's weights, and back."""
    y: Tensor = layer(x.to(layer.weight.dtype))
    return y.float()


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time, self.widen = nn.Linear(1, DIM), nn.Linear(CHANNELS, DIM)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        wide = linear(self.widen, x.movedim(1, -1))
        return (wide + self.time(t[:, None])[:, None, None, None]).tanh()


class Velocity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(DIM, CHANNELS)

    def forward(self, features: Tensor) -> Tensor:
        return linear(self.narrow, features).movedim(-1, 1)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.velocity = Features(), Velocity()


# How it is exported.

FEATURES = {"features": ("batch", "frames", "height", "width", DIM)}


def backbone(network: Network, interface: Interface) -> Graph:
    return Graph("backbone", network.features, *interface.of("backbone", FEATURES))


def flow_head(network: Network, interface: Interface) -> Graph:
    return Graph("flow_head", network.velocity, *interface.of("flow_head", FEATURES))


class DriftSource(Source):
    model, family, trained = "drift-1m", "drift", False
    parts = default_parts = ("backbone", "flow_head")

    def __init__(self, seed: int) -> None:
        self.seed, self.origin = seed, f"random weights, seed {seed}"

    def model_entry(self) -> dict[str, Any]:
        sizes = {"dim": DIM, "num_layers": 2, "head_blocks": 1, "num_heads": 2, "head_dim": DIM // 2}
        return {"architecture": "drift", **sizes, "patch_size": [1, 1, 1]}

    def latents_entry(self) -> dict[str, Any]:
        strides = {"temporal_stride": 4, "spatial_stride": 8}
        return {"channels": CHANNELS, **strides, "mean": [0.0] * CHANNELS, "std": [1.0] * CHANNELS}

    def text_entry(self) -> dict[str, Any]:
        return {"max_length": 8, "dim": 8, "pad_id": 0, "eos_id": 1}

    def check(self, parts: tuple[str, ...]) -> None:
        pass

    def module(self, which: str) -> nn.Module:
        return on_meta(Network)

    def tensor(self, which: str, name: str) -> Tensor:
        return random_tensor(name, dict(Network().named_parameters())[name].shape, self.seed)


class DriftExport(ExportFamily):
    name = "drift"
    models = ("drift-1m",)
    presets = {  # noqa: RUF012
        "drift": Preset("a drifting model", {"rule": "euler", "steps": 4},
                        {"frames": 5, "width": 64, "height": 32, "fps": 8}),
    }  # fmt: skip
    known_by = "drifts"
    exact, products = "time", "widen|narrow"

    def open(self, request: Request) -> Source:
        source = DriftSource(request.seed or 0)
        return source if request.decoder is None else WithDecoder(source, request.decoder)

    def builders(self) -> dict[str, Any]:
        return {**super().builders(), "backbone": backbone, "flow_head": flow_head}


# How it is sampled.


class DriftRuntime(RuntimeFamily):
    name = "drift"

    def settings(self, manifest: Manifest, wishes: Wishes) -> Settings:
        steps = manifest.sampler.steps if wishes.steps is None else wishes.steps
        return Settings(**common_settings(manifest, wishes, steps), times=tuple(uniform_times(steps).tolist()))

    def loop(
        self,
        backbone: Engine,
        flow_head: Engine,
        update: Engine,
        manifest: Manifest,
        latent_shape: LatentShape,
        text_tokens: int,
    ) -> DriftLoop:
        return DriftLoop(backbone, flow_head, update, latent_shape)


class DriftLoop:
    """Euler steps along the velocity; a drift reads no prompt."""

    def __init__(self, backbone: Engine, flow_head: Engine, update: Engine, shape: LatentShape) -> None:
        dims = dict(zip(("batch", "frames", "height", "width"), (1, *shape[2:]), strict=True))
        self._x, self._t = (backbone.empty(name, **dims) for name in ("x", "t"))
        self._features, velocity = backbone.empty("features", **dims), flow_head.empty("velocity", **dims)
        self._backbone = backbone.bind({"x": self._x, "t": self._t}, {"features": self._features})
        self._flow_head = flow_head.bind({"features": self._features}, {"velocity": velocity})
        self._updater = Updater(update, self._x, dims)
        self._update = self._updater.bind(velocity=velocity)
        self._launches = Launches(backbone, flow_head, update)

    def run(
        self,
        prompt_embeds: NDArray[Any],
        settings: Settings,
        timings: Timings,
        negative_embeds: NDArray[Any] | None = None,
        on_preview: Callable[[NDArray[np.float32]], object] | None = None,
        init: NDArray[Any] | None = None,
    ) -> Denoised:
        calls = Counted(timings, backbone=settings.steps, flow_head=settings.steps)
        Draws(settings.seed, settings.latent_shape, timings).into(self._x)

        def step(call: Call) -> None:
            call("backbone", self._backbone)
            call("flow_head", self._flow_head)
            call("flow_head", self._update, counts=False)

        for i, t in enumerate(settings.times[:-1]):
            self._t[...] = t
            self._updater.set(RULES["euler"](settings.times, i), t)
            self._launches.run(calls, step)
            self._updater.check(self._features)
        return Denoised(np.array(self._x, np.float32), settings.times)
