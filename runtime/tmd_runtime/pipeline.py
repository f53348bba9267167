"""Prompt -> frames: the stages of a bundle, put together.

    pipeline = tmd_runtime.load()                        # the built-in model; load("my-bundle") for another
    result = pipeline("a red circle moving right on a black background", seed=1)
    result.frames                                        # uint8 [F, H, W, 3]

Each stage is usable alone: `encode`, `denoise`, `decode`. A pipeline loads a graph when a stage first needs it and
keeps it, so only the first run is cold, unless memory is short (`memory.py`). One pipeline serves one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tmd_engines.cost.tiling import tile_size

from .autoencoder.decoder import ChunkDecoder
from .autoencoder.picture import encode_picture, start_size
from .autoencoder.tiles import decode_tiles
from .built_in import locate
from .checks import check_embeds, check_latents, check_preview, check_start, memory_failure, missing_graph
from .clock import Callback, Timings
from .errors import UsageFailure
from .memory import MODES, STAGES, Memory, MemoryChooser
from .result import Result
from .sampling.tim import TransitionLoop
from .sampling.tmd import DenoiseLoop
from .sampling.wan import VelocityLoop
from .settings import Settings, Wishes, resolve_settings
from .text.conditions import Conditions

if TYPE_CHECKING:
    from typing import Self, Unpack

    from tmd_engines import Bundle, Engine, Manifest


def load(
    bundle: str | Path | Bundle | None = None,
    engine: str = "auto",
    threads: int | None = None,
    device: str = "auto",
    memory: str = "auto",
) -> Pipeline:
    """Pipeline of a bundle (a folder, "builtin:NAME", or a `Bundle` already open; None: the built-in model).

    The whole bundle is checked here; its graphs are loaded by the stages. `engine` and `device` as in tmd_engines.load
    ("cpu", "cuda", "cuda:1"); `threads` limits the CPU threads of an engine. `memory` is "all" (graphs stay loaded),
    "low" (one stage after the other) or "auto" ("low" when "all" would not fit). Raises tmd_engines.BundleError if the
    bundle is not whole, RuntimeFailure if this installation has no built-in model, UsageFailure for a built-in one that
    is none, for another `memory`, and for an engine and a device that are none or do not go together.
    """
    from tmd_engines import Bundle

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(locate(bundle))
    return Pipeline(opened, engine, threads, device, memory)


class Pipeline:
    """The stages of one bundle on one engine. Made by `load`."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str = "auto",
        threads: int | None = None,
        device: str = "auto",
        memory: str = "auto",
    ) -> None:
        if memory not in MODES:
            raise UsageFailure(f"there is no memory mode {memory!r}: choose one of {', '.join(MODES)}.")
        from tmd_engines import EngineError
        from tmd_engines.registry import check_engine

        try:
            check_engine(engine, device)
        except EngineError as error:
            raise UsageFailure(str(error)) from None
        self.bundle = bundle
        self._engine, self._threads, self._device = engine, threads, device
        self._wanted_memory, self._chooser = memory, MemoryChooser(bundle)
        self._memory: Memory = "low" if memory == "low" else "all"
        self._engines: dict[str, Engine] = {}
        self._conditions = Conditions(bundle)
        # Buffers of the latest shape only: those of two sizes of a large model would not fit side by side.
        self._loop: tuple[Any, DenoiseLoop | VelocityLoop | TransitionLoop] | None = None
        self._decoder: tuple[Any, ChunkDecoder] | None = None
        self.latest: Settings | None = None  # the latest run that was denoised, with the steps that it took

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def settings(
        self,
        seed: int | None = None,
        steps: int | None = None,
        inner_steps: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        **more: Unpack[Wishes],
    ) -> Settings:
        """The settings of a run with these wishes; loads nothing. Raises UsageFailure saying what the bundle allows."""
        return resolve_settings(self.manifest, seed, steps, inner_steps, frames, size, **more)

    def __call__(
        self,
        prompt: str = "",
        seed: int | None = None,
        steps: int | None = None,
        inner_steps: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        on_frames: Callable[[NDArray[np.uint8]], object] | None = None,
        *,
        prompt_embeds: NDArray[Any] | None = None,
        negative_embeds: NDArray[Any] | None = None,
        image: NDArray[np.uint8] | None = None,
        init_latents: NDArray[Any] | None = None,
        on_embeds: Callable[[NDArray[np.float32], NDArray[np.float32] | None], object] | None = None,
        on_latents: Callable[[NDArray[np.float32]], object] | None = None,
        on_preview: Callable[[NDArray[np.uint8]], object] | None = None,
        **more: Unpack[Wishes],
    ) -> Result:
        """Make one video. What is None comes from the bundle, the seed at random; `size` is (width, height) in pixels.

        `more` are guidance, negative_prompt, shift, schedule, deadline, strength, label and rho (`resolve_settings`).
        `prompt_embeds` (and `negative_embeds`, where guidance is not 1) `[1, text, E]` take the place of the prompts; a
        model of classes takes a label and no prompt. `image` uint8 `[H, W, 3]`, or latents of one, `init_latents`
        `[1, C, 1, h, w]`, is the picture that a run with a strength starts from; without a `size`, in its own shape.
        `callback(StepInfo)` is called after every step; returning False stops the run. `on_embeds` gets the embeddings
        before denoising, `on_latents` the latents before decoding, `on_frames(uint8 [f, H, W, 3])` each piece of the
        video while the next one decodes, `on_preview(uint8 [F, H, W, 3])` before each step but the last what the run
        would give if it were the last; that changes nothing in the result. With `on_embeds` a bundle without backbone
        ends there, with `on_latents` one without decoder; the result then has no frames.
        Raises UsageFailure (bad wish), Cancelled, RuntimeFailure, or tmd_engines.EngineError; the pipeline stays usable
        after each.
        """
        size = start_size(self.manifest, size, image, init_latents)
        settings = self.settings(seed, steps, inner_steps, frames, size, **more)
        check_start(settings, init_latents, image)
        if settings.label is not None and (prompt or prompt_embeds is not None):
            raise UsageFailure("this model draws numbered classes and takes no prompt: leave the prompt out.")
        unused = () if prompt_embeds is None else STAGES[0]
        self.choose_memory(settings, unused if image is not None else (*unused, "encoder"))
        if on_preview is not None:
            check_preview(settings, self._memory)
        stages = ("load", "text", "noise", "backbone", "flow_head", "decode")
        timings = Timings(callback, dict.fromkeys(stages, 0.0))
        warnings = list(settings.warnings)
        graphs = self.manifest.graphs
        latents: NDArray[np.float32] | None = None
        pieces = [np.empty((0, settings.height, settings.width, 3), np.uint8)]
        with memory_failure(settings):
            if image is not None:
                init_latents = self.encode_image(image, (settings.width, settings.height), callback, timings.seconds)
            embeds = self._embed(prompt, prompt_embeds, negative_embeds, settings, timings, warnings)
            if on_embeds is not None and settings.label is None:
                on_embeds(*embeds)
            if "backbone" in graphs or on_embeds is None:
                preview = None if on_preview is None else self._previewer(on_preview, settings, timings)
                latents = self._denoise(*embeds, settings, timings, preview, init_latents)
                settings = self.latest or settings
                if on_latents is not None:
                    on_latents(latents)
            if latents is not None and ("decoder_first" in graphs or on_latents is None):
                for piece in self._decode(latents, timings):
                    pieces.append(piece)
                    if on_frames is not None:
                        on_frames(piece)
            video = np.concatenate(pieces)
        told = {"stage_seconds": timings.seconds, "warnings": tuple(warnings), "memory": self._memory}
        return Result.of(settings, video, prompt=prompt, latents=latents, **told)

    def choose_memory(self, settings: Settings, unused: Collection[str] = ()) -> Memory:
        """With memory "auto", settle whether graphs stay loaded in the runs to come; `unused` graphs do not count.

        A run does this itself. Raises RuntimeFailure if such a run would not fit at all. Returns the mode.
        """
        if self._wanted_memory == "auto":
            self._memory = self._chooser.choose(settings, unused, self._engines)
        return self._memory

    def encode(self, prompt: str) -> NDArray[np.float32]:
        """Prompt embeddings float32 `[1, text, E]`.

        Raises UsageFailure for an empty prompt, RuntimeFailure if the bundle has no text encoder.
        """
        timings = Timings()
        with self._stage("text_encoder"):
            return self._conditions.encoder(prompt, lambda: self._graph("text_encoder", timings), timings)[0]

    def encode_image(
        self,
        image: NDArray[np.uint8],
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        seconds: dict[str, float] | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, 1, h, w]` of a picture, uint8 `[H, W, 3]`: of its middle, scaled to `size` (width, height).

        Without a size, in its own shape with about as many pixels as the model was made for. Raises as a run does;
        `seconds` as in `decode_chunks`, for `load` and `encode`.
        """
        timings = Timings(callback, seconds)
        with self._stage("encoder"):
            return encode_picture(lambda: self._graph("encoder", timings), self.manifest, image, size, timings)

    def denoise(
        self,
        prompt_embeds: NDArray[Any] | None,
        seed: int | None = None,
        steps: int | None = None,
        inner_steps: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        *,
        negative_embeds: NDArray[Any] | None = None,
        init_latents: NDArray[Any] | None = None,
        **more: Unpack[Wishes],
    ) -> NDArray[np.float32]:
        """Latents `[1, C, T, h, w]` float32, normalised (mean 0, deviation 1), from the embeddings of `encode`, or from
        None for a model of classes.

        With guidance other than 1, `negative_embeds` of the same shape are needed, unless those of the empty prompt lie
        in the bundle; they may then have another length too. Raises as a run does.
        """
        size = start_size(self.manifest, size, None, init_latents)
        settings = self.settings(seed, steps, inner_steps, frames, size, **more)
        check_start(settings, init_latents)
        if settings.label is not None:
            prompt_embeds, negative_embeds = self._embed("", None, None, settings, Timings(), [])
        elif prompt_embeds is None:
            raise UsageFailure("this model needs the embeddings of a prompt: make them with encode.")
        if settings.passes == 1:
            negative_embeds = None
        elif negative_embeds is None and prompt_embeds.ndim == 3:
            negative_embeds = self._conditions.null_embeds(prompt_embeds.shape[1])
        if settings.passes == 2 and negative_embeds is None:
            raise UsageFailure("guidance needs negative_embeds as well: encode the negative prompt, or set guidance=1.")
        self.choose_memory(settings, unused=(*STAGES[0], *STAGES[2], "encoder"))
        with memory_failure(settings):
            return self._denoise(prompt_embeds, negative_embeds, settings, Timings(callback), None, init_latents)

    def decode(self, latents: NDArray[Any]) -> NDArray[np.uint8]:
        """Frames uint8 `[F, H, W, 3]` of latents `[1, C, T, h, w]` from `denoise`."""
        return np.concatenate(list(self.decode_chunks(latents)))

    def decode_chunks(
        self, latents: NDArray[Any], callback: Callback | None = None, seconds: dict[str, float] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """As `decode`, in pieces: one frame, then a few for each further latent frame. Each is the caller's own.

        `seconds`, if given, is filled with what `load` and `decode` took.
        """
        timings = Timings(callback, seconds)
        yield from self._decode(latents, timings)

    def close(self) -> None:
        """Give the engines and buffers back. A later run loads them again."""
        self._free(set(self._engines))
        self._conditions.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free(self, graphs: set[str]) -> None:
        """Closes the engines of `graphs`, and lets go of what is bound to them."""
        if graphs & {"backbone", "flow_head"}:
            self._loop = None
        if graphs & {"decoder_first", "decoder_step"}:
            self._decoder = None
        for name in graphs & set(self._engines):
            self._engines.pop(name).close()

    @contextmanager
    def _stage(self, graph: str) -> Iterator[None]:
        """Around the stage of `graph`: with memory "low" no other stage is loaded, and none when it is over."""
        own = next(set(stage) for stage in STAGES if graph in stage)
        if self._memory == "low":
            self._free(set(self._engines) - own)
        try:
            yield
        finally:
            if self._memory == "low":
                self._free(own)

    def _graph(self, name: str, timings: Timings) -> Engine:
        """The engine of a graph, loaded at first use and timed as `load`."""
        if name in self._engines:
            return self._engines[name]
        if name not in self.manifest.graphs:
            raise missing_graph(name)
        from tmd_engines import load as load_engine

        start = perf_counter()
        engine = load_engine(self.bundle, name, engine=self._engine, device=self._device, threads=self._threads)
        seconds = perf_counter() - start
        self._engines[name] = engine
        timings.add("load", seconds)
        timings.report("load", len(self._engines), len(self.manifest.graphs), seconds)
        return engine

    def _embed(
        self,
        prompt: str,
        prompt_embeds: NDArray[Any] | None,
        negative_embeds: NDArray[Any] | None,
        settings: Settings,
        timings: Timings,
        warnings: list[str],
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """The conditions of a run, with the text encoder as the only stage that is loaded if memory is low."""
        with self._stage("text_encoder"):
            return self._conditions(
                prompt,
                prompt_embeds,
                negative_embeds,
                settings,
                lambda: self._graph("text_encoder", timings),
                timings,
                warnings,
            )

    def _denoise(
        self,
        prompt_embeds: NDArray[Any],
        negative_embeds: NDArray[Any] | None,
        settings: Settings,
        timings: Timings,
        on_preview: Callable[[NDArray[np.float32]], object] | None,
        init: NDArray[Any] | None,
    ) -> NDArray[np.float32]:
        self.latest = None
        labelled = settings.label is not None
        if not labelled:
            prompt_embeds, negative_embeds = self._conditions.same_length(prompt_embeds, negative_embeds)
            check_embeds(prompt_embeds, negative_embeds, self.manifest.text.dim)
        with self._stage("backbone"):
            key = (settings.latent_shape, 1 if labelled else prompt_embeds.shape[1])
            before = self._loop
            if before is None or before[0] != key:
                engines = self._graph("backbone", timings), self._graph("flow_head", timings)
                if settings.rule != "flow_map" or (before and before[0][0] != key[0]):
                    before = None  # only for a prompt of another length it holds what an engine compiled for the size
                self._loop = None
                loops: dict[str, type[Any]] = {"transition": DenoiseLoop, "flow_map": TransitionLoop}
                kind = loops.get(settings.rule, VelocityLoop)
                self._loop = key, kind(*engines, self.manifest, *key)
            assert self._loop is not None
            loop = self._loop[1]
            if isinstance(loop, TransitionLoop):
                latents = loop.run(prompt_embeds, settings, timings, negative_embeds, on_preview, init)
                settings = settings.through(loop.times)
                del before
            else:
                latents = loop.run(prompt_embeds, settings, timings, negative_embeds, on_preview)
            self.latest = settings
            return latents

    def _previewer(
        self, on_preview: Callable[[NDArray[np.uint8]], object], settings: Settings, timings: Timings
    ) -> Callable[[NDArray[np.float32]], object]:
        """Decodes the latents of a preview for `on_preview`; its seconds count as `decode`, its steps as none."""
        silent = Timings(seconds=timings.seconds)
        return lambda latents: on_preview(np.concatenate(list(self._decode(latents, silent))))

    def _decode(self, latents: NDArray[Any], timings: Timings) -> Iterator[NDArray[np.uint8]]:
        check_latents(latents, self.manifest.latents.channels)
        with self._stage("decoder_first"):
            geometry, is_still = self.manifest.latents, self.manifest.model.kind == "tim" and latents.shape[2] == 1
            whole = latents.shape[3], latents.shape[4]
            key = tile_size(*whole, geometry.spatial_stride) if is_still else whole
            if self._decoder is None or self._decoder[0] != key:
                first = self._graph("decoder_first", timings)
                self._decoder = None
                self._decoder = key, ChunkDecoder(first, geometry, *key)
            decoder = self._decoder[1]
            if key != whole:
                yield decode_tiles(decoder, latents, key, geometry.spatial_stride, timings)
            else:
                yield from decoder.chunks(latents, lambda: self._graph("decoder_step", timings), timings)
