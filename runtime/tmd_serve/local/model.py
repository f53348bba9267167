"""One served model: a bundle, its card, and what a request of it comes to."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tmd_runtime
from tmd_runtime import RuntimeFailure, UsageFailure
from tmd_runtime.autoencoder.picture import decode_picture, start_size
from tmd_runtime.checks import check_condition, check_prompt, check_start, missing_graph
from tmd_runtime.memory import MemoryChooser
from tmd_runtime.sampling import family_of

from ..errors import Refusal
from ..executor import ModelCard, Plan, Wanted
from .card import options_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tmd_engines.cost.sizing import Estimate, Memory
    from tmd_runtime import Pipeline, Settings

    from ..settings import Limits

_DECODING = threading.Lock()
"""One upload at a time: a decoded picture may take most of a gigabyte."""
_SIZES = 64  # estimates that are remembered


@dataclass(frozen=True)
class EngineOptions:
    """What the pipelines of a server are opened with, as in `tmd_runtime.load`."""

    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None
    memory: str = "auto"


class Model:
    """A bundle under a name. Opening checks the whole bundle and, if it `runs_here`, that this machine has engines for
    it; nothing is loaded. One that runs elsewhere has no estimate of its time.

    Raises tmd_engines.BundleError, or RuntimeFailure if a graph or every engine for one is missing.
    """

    def __init__(
        self, name: str, bundle: str | Path, options: EngineOptions, limits: Limits, runs_here: bool = True
    ) -> None:
        self.name, self._options, self._limits, self._runs_here = name, options, limits, runs_here
        # This one only answers questions, from the threads of requests; another one runs.
        self._scout = tmd_runtime.load(bundle, options.engine, options.threads, options.device, options.memory)
        self.bundle, self.manifest = self._scout.bundle, self._scout.manifest
        self._chooser = MemoryChooser(self.bundle, options.engine, options.device)
        self._lock = threading.Lock()
        self._estimates: OrderedDict[object, Estimate] = OrderedDict()
        self._check()
        classes = self.manifest.family.classes(self.manifest.model)
        self.estimate(self._scout.settings(label=None if classes is None else 0))  # an unsizable graph fails here
        created = int((self.bundle.folder / "manifest.json").stat().st_mtime)
        self.card = ModelCard(name, created, options_of(self._scout, limits))

    def _check(self) -> None:
        needed = ["backbone", "flow_head", "update", "decoder_first"]
        if self.manifest.family.classes(self.manifest.model) is None:
            needed.insert(0, "text_encoder")
        for graph in needed:
            if graph not in self.manifest.graphs:
                raise missing_graph(graph)
        if self._runs_here and not self._scout.has_engines():
            engine, device = self._options.engine, self._options.device
            remedy = f"{engine} on {device} was chosen, and tmd-engine doctor says what it lacks"
            if (engine, device) == ("auto", "auto"):
                remedy = "install one (pip install '.[cpu]' in tmd's checkout), or see tmd-engine doctor"
            raise RuntimeFailure(f"this machine has no engine for the model {self.name}: {remedy}.")

    def open(self, memory: Memory | None = None) -> Pipeline:
        """A pipeline to run, in this memory mode (None: as the server was told)."""
        options = self._options
        return tmd_runtime.load(self.bundle, options.engine, options.threads, options.device, memory or options.memory)

    def settings(self, wishes: Mapping[str, Any]) -> Settings:
        """The settings of wishes as they are stored, where a size is a list."""
        size = wishes.get("size")
        return self._scout.settings(**{**wishes, "size": None if size is None else tuple(size)})

    def estimate(self, settings: Settings) -> Estimate:
        """Memory and work of a run. Raises BundleError if a graph cannot be sized."""
        key = settings.frames, settings.width, settings.height, settings.passes
        with self._lock:
            if key not in self._estimates:
                self._estimates[key] = self._chooser.estimate(settings)
                if len(self._estimates) > _SIZES:
                    self._estimates.popitem(last=False)
            return self._estimates[key]

    def seconds(self, settings: Settings, pictured: bool) -> float | None:
        """The estimated time of a run on this machine, which encodes a picture if `pictured`; None: unknown."""
        if not self._runs_here:
            return None
        with self._lock:
            return self._scout.forecast.seconds(settings, pictured)

    def plan(self, wanted: Wanted, budget: int | None) -> Plan:
        """A request, completed and checked. Raises Refusal or UsageFailure."""
        limits = self._limits
        check_prompt(wanted.prompt)
        for name, text in (("prompt", wanted.prompt), ("negative_prompt", wanted.wishes.get("negative_prompt") or "")):
            if len(text) > limits.prompt_chars:
                raise _too_much(name, len(text), limits.prompt_chars, "characters")
        wishes = {name: value for name, value in wanted.wishes.items() if value is not None}
        if wanted.seconds is not None:
            wishes["frames"] = self._frames(wanted.seconds, wishes.get("fps"))
        image = None if wanted.picture is None else self._picture(wanted.picture)
        size = start_size(self.manifest, wishes.get("size"), image)
        settings = self._scout.settings(**{**wishes, "size": size})
        check_start(family_of(self.manifest).takes_picture(self.manifest), settings, None, image)
        check_condition(settings, wanted.prompt)
        if settings.label is None:
            self._check_words(wanted.prompt)
        self._check_limits(settings)
        estimated, memory = self._check_cost(settings, image is not None, budget)
        stored = {**wishes, "seed": settings.seed, "size": [settings.width, settings.height]}
        return Plan(
            request={
                "prompt": wanted.prompt,
                "wishes": stored,
                "preview": wanted.preview,
                "picture": image is not None,
            },
            resolved=_resolved(settings, wanted.preview),
            group=f"{self.name} {settings.width}x{settings.height}x{settings.frames} {settings.passes}",
            seconds=estimated,
            memory_bytes=memory,
        )

    def _check_words(self, prompt: str) -> None:
        try:
            with self._lock:
                self._scout.check_prompt(prompt)
        except UsageFailure as error:
            raise Refusal(str(error), param="prompt") from error

    def _frames(self, seconds: float, fps: int | None) -> int:
        """The number of frames that comes nearest to a length, at `fps` or as fast as the model's videos are shown."""
        fps = self.manifest.video.fps if fps is None else fps
        step = self.manifest.latents.temporal_stride
        return 1 + step * max(round((seconds * fps - 1) / step), 0)

    def _picture(self, data: bytes) -> NDArray[np.uint8]:
        """As large as the picture in a file, which can be decoded, and without its pixels: the run reads it again."""
        try:
            with _DECODING:
                shape = decode_picture(data, "the picture", self._limits.picture_pixels).shape
            return np.broadcast_to(np.zeros(1, np.uint8), shape)
        except RuntimeFailure as error:
            raise Refusal(str(error), param="input_reference", code="invalid_picture") from error

    def _check_limits(self, settings: Settings) -> None:
        limits = self._limits
        pixels = settings.width * settings.height
        if pixels > limits.pixels:
            raise _too_much("size", pixels, limits.pixels, "pixels")
        for name, value, most in (
            ("frames", settings.frames, limits.frames),
            ("steps", settings.steps, limits.steps),
        ):
            if value > most:
                raise _too_much(name, value, most, name)
        if settings.deadline is not None and settings.deadline > limits.seconds:
            raise _too_much("deadline", settings.deadline, limits.seconds, "seconds")

    def _check_cost(self, settings: Settings, pictured: bool, budget: int | None) -> tuple[float | None, int]:
        need = self.estimate(settings).peak("low")
        if budget is not None and need > budget:
            raise Refusal(
                f"{settings.frames} frames of {settings.width}x{settings.height} need about {need / 1e9:.1f} GB, and "
                f"this server may use {budget / 1e9:.1f} GB: choose fewer frames or a smaller size.",
                code="too_large_for_memory",
            )
        seconds = self.seconds(settings, pictured)
        if seconds is not None and seconds > self._limits.seconds:
            raise Refusal(
                f"this run would take about {seconds:.0f} s here, and the server allows {self._limits.seconds:g} s: "
                "choose fewer steps, fewer frames or a smaller size.",
                code="limit_exceeded",
            )
        return seconds, need


def _too_much(param: str, value: float, most: float, unit: str) -> Refusal:
    return Refusal(
        f"{value:.10g} {unit} are more than this server allows, {most:.10g}: choose fewer.",
        param=param,
        code="limit_exceeded",
    )


def _resolved(settings: Settings, preview: bool) -> dict[str, Any]:
    """What the API shows of settings."""
    names = ("seed", "steps", "inner_steps", "frames", "width", "height", "fps", "guidance", "negative_prompt", "nfe")
    more = ("strength", "label", "deadline", "rho")
    return {
        **{name: getattr(settings, name) for name in (*names, *more)},
        "times": list(settings.times),
        "preview": preview,
        "warnings": list(settings.warnings),
    }


def open_models(
    named: Mapping[str, str | Path], options: EngineOptions, limits: Limits, runs_here: bool = True
) -> dict[str, Model]:
    """The models of bundles by name. Raises UsageFailure for none, and as `Model` does."""
    if not named:
        raise UsageFailure("a server needs a model: name a bundle.")
    return {name: Model(name, bundle, options, limits, runs_here) for name, bundle in named.items()}
