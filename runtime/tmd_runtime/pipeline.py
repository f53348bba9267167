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

from .checks import check_embeds, check_preview, check_start, memory_failure, missing_graph
from .decoder import ChunkDecoder
from .errors import RuntimeFailure, UsageFailure
from .loop import Callback, DenoiseLoop, Timings
from .memory import MODES, STAGES, Memory, MemoryChooser
from .result import Result
from .settings import Settings, Wishes, resolve_settings
from .text import PromptEncoder
from .tiles import decode_tiles, tile_size
from .transition_loop import TransitionLoop
from .velocity_loop import VelocityLoop

if TYPE_CHECKING:
    from typing import Self, Unpack

    from tmd_engines import Bundle, Engine, Manifest

BUILT_IN = Path(__file__).parent / "bundles" / "tiny"

_GRAPHS = ("text_encoder", "backbone", "flow_head", "decoder_first", "decoder_step")


def load(
    bundle: str | Path | Bundle | None = None,
    engine: str = "auto",
    threads: int | None = None,
    device: str = "auto",
    memory: str = "auto",
) -> Pipeline:
    """Pipeline of a bundle (a folder, or a `Bundle` already open; None: the built-in model).

    The whole bundle is checked here; its graphs are loaded by the stages. `engine` and `device` as in tmd_engines.load
    ("cpu", "cuda", "cuda:1"); `threads` limits the CPU threads of an engine. `memory` is "all" (graphs stay loaded),
    "low" (one stage after the other) or "auto" ("low" when "all" would not fit). Raises tmd_engines.BundleError if the
    bundle is not whole, RuntimeFailure if this installation has no built-in model, UsageFailure for another `memory`,
    and for an engine and a device that are none or do not go together.
    """
    from tmd_engines import Bundle

    if bundle is None:
        if not BUILT_IN.is_dir():
            raise RuntimeFailure(
                "this installation has no built-in model. Install tmd again, or name a bundle (--bundle DIR)."
            )
        bundle = BUILT_IN
    return Pipeline(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), engine, threads, device, memory)


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
        from tmd_engines.engine import check_engine

        try:
            check_engine(engine, device)
        except EngineError as error:
            raise UsageFailure(str(error)) from None
        self.bundle = bundle
        self._engine, self._threads, self._device = engine, threads, device
        self._wanted_memory, self._chooser = memory, MemoryChooser(bundle)
        self._memory: Memory = "low" if memory == "low" else "all"
        self._engines: dict[str, Engine] = {}
        self._encoder = PromptEncoder(bundle)
        # Buffers of the latest shape only: those of two sizes of a large model would not fit side by side.
        self._loop: tuple[Any, DenoiseLoop | VelocityLoop | TransitionLoop] | None = None
        self._decoder: tuple[Any, ChunkDecoder] | None = None
        # The latest one: a file of prompts has them all against the same negative prompt.
        self._negative: tuple[str, NDArray[np.float32]] | None = None
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
        init_latents: NDArray[Any] | None = None,
        on_embeds: Callable[[NDArray[np.float32], NDArray[np.float32] | None], object] | None = None,
        on_latents: Callable[[NDArray[np.float32]], object] | None = None,
        on_preview: Callable[[NDArray[np.uint8]], object] | None = None,
        **more: Unpack[Wishes],
    ) -> Result:
        """Make one video. What is None comes from the bundle, the seed at random; `size` is (width, height) in pixels.

        `more` are guidance, negative_prompt, shift, schedule, deadline, strength and label (`resolve_settings`).
        `prompt_embeds` (and `negative_embeds`, where guidance is not 1) `[1, text, E]` take the place of the prompts; a
        model of classes takes a label and no prompt. `init_latents` `[1, C, 1, h, w]` are a picture that a run with
        a strength starts from.
        `callback(StepInfo)` is called after every step; returning False stops the run. `on_embeds` gets the embeddings
        before denoising, `on_latents` the latents before decoding, `on_frames(uint8 [f, H, W, 3])` each piece of the
        video while the next one decodes, `on_preview(uint8 [F, H, W, 3])` before each step but the last what the run
        would give if it were the last; that changes nothing in the result. With `on_embeds` a bundle without backbone
        ends there, with `on_latents` one without decoder; the result then has no frames.
        Raises UsageFailure (bad wish), Cancelled, RuntimeFailure, or tmd_engines.EngineError; the pipeline stays usable
        after each.
        """
        if init_latents is not None and size is None:
            size = self._pixels(init_latents)
        settings = self.settings(seed, steps, inner_steps, frames, size, **more)
        check_start(settings, init_latents)
        if settings.label is not None and (prompt or prompt_embeds is not None):
            raise UsageFailure("this model draws numbered classes and takes no prompt: leave the prompt out.")
        self.choose_memory(settings, unused=() if prompt_embeds is None else STAGES[0])
        if on_preview is not None:
            check_preview(settings, self._memory)
        stages = ("load", "text", "noise", "backbone", "flow_head", "decode")
        timings = Timings(callback, dict.fromkeys(stages, 0.0))
        warnings = list(settings.warnings)
        graphs = self.manifest.graphs
        latents: NDArray[np.float32] | None = None
        pieces = [np.empty((0, settings.height, settings.width, 3), np.uint8)]
        with memory_failure(settings):
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
        return Result(
            frames=video,
            fps=settings.fps,
            prompt=prompt,
            seed=settings.seed,
            steps=settings.steps,
            inner_steps=settings.inner_steps,
            nfe=settings.nfe,
            stage_seconds=timings.seconds,
            warnings=tuple(warnings),
            rule=settings.rule,
            guidance=settings.guidance,
            memory=self._memory,
            times=settings.times,
            latents=latents,
        )

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
            return self._encoder(prompt, lambda: self._graph("text_encoder", timings), timings)[0]

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

        With guidance other than 1, `negative_embeds` of the same shape are needed. Raises as a run does.
        """
        if init_latents is not None and size is None:
            size = self._pixels(init_latents)
        settings = self.settings(seed, steps, inner_steps, frames, size, **more)
        check_start(settings, init_latents)
        if settings.label is not None:
            prompt_embeds, negative_embeds = self._embed("", None, None, settings, Timings(), [])
        elif prompt_embeds is None:
            raise UsageFailure("this model needs the embeddings of a prompt: make them with encode.")
        if settings.passes == 1:
            negative_embeds = None
        elif negative_embeds is None:
            raise UsageFailure("guidance needs negative_embeds as well: encode the negative prompt, or set guidance=1.")
        self.choose_memory(settings, unused=(*STAGES[0], *STAGES[2]))
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
        self._negative = None

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
        timings.report("load", len(self._engines), len(_GRAPHS), seconds)
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
        """Embeddings of the prompt and, with guidance, of the negative prompt, encoded where they are not given; of a
        model of classes their numbers, and that of none."""
        if settings.label is not None:
            numbers = np.array([settings.label]), np.array([self.manifest.model.classes])
            return numbers[0], None if settings.passes == 1 else numbers[1]
        if settings.passes == 1:
            negative_embeds = None
        elif negative_embeds is None and self._negative is not None and self._negative[0] == settings.negative_prompt:
            negative_embeds = self._negative[1]
        total = (prompt_embeds is None) + (settings.passes == 2 and negative_embeds is None)

        def load_encoder() -> Engine:
            return self._graph("text_encoder", timings)

        with self._stage("text_encoder"):
            if prompt_embeds is None:
                prompt_embeds, said = self._encoder(prompt, load_encoder, timings, total=total)
                warnings += said
            if settings.passes == 2 and negative_embeds is None:
                negative = settings.negative_prompt
                negative_embeds, _ = self._encoder(negative, load_encoder, timings, total, total, allow_empty=True)
                self._negative = negative, negative_embeds
        return prompt_embeds, negative_embeds

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
            check_embeds(prompt_embeds, negative_embeds, self.manifest.text.dim)
        with self._stage("backbone"):
            key = (settings.latent_shape, 1 if labelled else prompt_embeds.shape[1])
            if self._loop is None or self._loop[0] != key:
                engines = self._graph("backbone", timings), self._graph("flow_head", timings)
                self._loop = None
                loops: dict[str, type[Any]] = {"transition": DenoiseLoop, "flow_map": TransitionLoop}
                kind = loops.get(settings.rule, VelocityLoop)
                self._loop = key, kind(*engines, self.manifest, *key)
            loop = self._loop[1]
            if isinstance(loop, TransitionLoop):
                latents = loop.run(prompt_embeds, settings, timings, negative_embeds, on_preview, init)
                settings = settings.through(loop.times)
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

    def _pixels(self, latents: NDArray[Any]) -> tuple[int, int]:
        """(width, height) of what latents `[..., h, w]` decode to."""
        stride = self.manifest.latents.spatial_stride
        return latents.shape[-1] * stride, latents.shape[-2] * stride

    def _decode(self, latents: NDArray[Any], timings: Timings) -> Iterator[NDArray[np.uint8]]:
        channels = self.manifest.latents.channels
        if latents.ndim != 5 or latents.shape[:2] != (1, channels) or 0 in latents.shape:
            raise RuntimeFailure(
                f"latents must be [1, {channels}, frames, height, width] for this bundle, not {list(latents.shape)}."
            )
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
