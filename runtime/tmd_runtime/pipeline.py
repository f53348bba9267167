"""Prompt -> frames: the stages of a bundle, put together.

    pipeline = tmd_runtime.load()                        # the built-in model; load("my-bundle") for another
    result = pipeline("a red circle moving right on a black background", seed=1)
    result.frames                                        # uint8 [F, H, W, 3]

Each stage is usable alone: `encode`, `denoise`, `decode`. A pipeline loads a graph when a stage first needs it and
keeps it, so only the first run is cold. One pipeline serves one thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .decoder import ChunkDecoder
from .errors import RuntimeFailure
from .loop import Callback, DenoiseLoop, Timings, check_finite
from .settings import Settings, resolve_settings
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing import Self

    from tmd_engines import Bundle, Engine, Manifest

BUILT_IN = Path(__file__).parent / "bundles" / "tiny"

_GRAPHS = ("text_encoder", "backbone", "flow_head", "decoder_first", "decoder_step")
_NEEDED_FOR = {
    "text_encoder": "read a prompt",
    "backbone": "denoise",
    "flow_head": "denoise",
    "decoder_first": "turn latents into frames",
    "decoder_step": "turn latents into more than one frame",
}


@dataclass(frozen=True)
class Result:
    """What a run gave: `frames` uint8 `[F, H, W, 3]` (RGB), how they came about, and the seconds per stage.

    `stage_seconds` has the stages `load` (0 when warm), `text`, `noise`, `backbone`, `flow_head`, `decode`.
    `warnings` are for people.
    """

    frames: NDArray[np.uint8] = field(repr=False)
    fps: int
    prompt: str
    seed: int
    steps: int
    inner_steps: int
    nfe: float
    stage_seconds: dict[str, float]
    warnings: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return int(self.frames.shape[1])

    @property
    def width(self) -> int:
        return int(self.frames.shape[2])


def load(
    bundle: str | Path | Bundle | None = None, engine: str = "auto", threads: int | None = None, device: str = "cpu"
) -> Pipeline:
    """Pipeline of a bundle (a folder, or a `Bundle` already open; None: the built-in model).

    The whole bundle is checked here; its graphs are loaded by the stages. `threads` limits the CPU threads of an
    engine. Raises tmd_engines.BundleError if the bundle is not whole, RuntimeFailure if this installation has no
    built-in model.
    """
    from tmd_engines import Bundle

    if bundle is None:
        if not BUILT_IN.is_dir():
            raise RuntimeFailure(
                "this installation has no built-in model. Install tmd again, or name a bundle (--bundle DIR)."
            )
        bundle = BUILT_IN
    return Pipeline(bundle if isinstance(bundle, Bundle) else Bundle.open(bundle), engine, threads, device)


class Pipeline:
    """The stages of one bundle on one engine. Made by `load`."""

    def __init__(self, bundle: Bundle, engine: str = "auto", threads: int | None = None, device: str = "cpu") -> None:
        self.bundle = bundle
        self._engine, self._threads, self._device = engine, threads, device
        self._engines: dict[str, Engine] = {}
        self._tokenizer: Tokenizer | None = None
        # Buffers of the latest shape only: those of two sizes of a large model would not fit side by side.
        self._loop: tuple[Any, DenoiseLoop] | None = None
        self._decoder: tuple[Any, ChunkDecoder] | None = None

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
    ) -> Settings:
        """The settings of a run with these wishes; loads nothing. Raises UsageFailure saying what the bundle allows."""
        return resolve_settings(self.manifest, seed, steps, inner_steps, frames, size)

    def __call__(
        self,
        prompt: str,
        seed: int | None = None,
        steps: int | None = None,
        inner_steps: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        on_frames: Callable[[NDArray[np.uint8]], object] | None = None,
    ) -> Result:
        """Make one video. What is None comes from the bundle, the seed at random; `size` is (width, height) in pixels.

        `callback(StepInfo)` is called after every step; returning False stops the run. `on_frames(uint8 [f, H, W,
        3])` gets each piece of the video while the next one decodes. Raises UsageFailure (bad wish), Cancelled,
        RuntimeFailure, or tmd_engines.EngineError; the pipeline stays usable after each.
        """
        settings = self.settings(seed, steps, inner_steps, frames, size)
        timings = Timings(callback)
        timings.seconds = dict.fromkeys(("load", "text", "noise", "backbone", "flow_head", "decode"), 0.0)
        pieces = []
        with _memory_failure(settings):
            prompt_embeds, warnings = self._encode(prompt, timings)
            latents = self._denoise(prompt_embeds, settings, timings)
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
            warnings=(*settings.warnings, *warnings),
        )

    def encode(self, prompt: str) -> NDArray[np.float32]:
        """Prompt embeddings float32 `[1, text, E]`.

        Raises UsageFailure for an empty prompt, RuntimeFailure if the bundle has no text encoder.
        """
        return self._encode(prompt, Timings())[0]

    def denoise(
        self,
        prompt_embeds: NDArray[Any],
        seed: int | None = None,
        steps: int | None = None,
        inner_steps: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, T, h, w]` float32, normalised (mean 0, deviation 1), from the embeddings of `encode`."""
        settings = self.settings(seed, steps, inner_steps, frames, size)
        with _memory_failure(settings):
            return self._denoise(prompt_embeds, settings, Timings(callback))

    def decode(self, latents: NDArray[Any]) -> NDArray[np.uint8]:
        """Frames uint8 `[F, H, W, 3]` of latents `[1, C, T, h, w]` from `denoise`."""
        return np.concatenate(list(self.decode_chunks(latents)))

    def decode_chunks(self, latents: NDArray[Any], callback: Callback | None = None) -> Iterator[NDArray[np.uint8]]:
        """As `decode`, in pieces: one frame, then a few for each further latent frame. Each is the caller's own."""
        yield from self._decode(latents, Timings(callback))

    def close(self) -> None:
        """Give the engines and buffers back. A later run loads them again."""
        self._loop = self._decoder = None
        while self._engines:
            self._engines.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _graph(self, name: str, timings: Timings) -> Engine:
        """The engine of a graph, loaded at first use and timed as `load`."""
        if name in self._engines:
            return self._engines[name]
        if name not in self.manifest.graphs:
            raise RuntimeFailure(
                f"this bundle has no graph {name}, so it cannot {_NEEDED_FOR[name]}. "
                f"Export it again with {name} among --parts, or use another bundle."
            )
        from tmd_engines import load as load_engine

        start = perf_counter()
        engine = load_engine(self.bundle, name, engine=self._engine, device=self._device, threads=self._threads)
        seconds = perf_counter() - start
        self._engines[name] = engine
        timings.add("load", seconds)
        timings.report("load", len(self._engines), len(_GRAPHS), seconds)
        return engine

    def _encode(self, prompt: str, timings: Timings) -> tuple[NDArray[np.float32], list[str]]:
        if self._tokenizer is None:
            text = self.manifest.text
            if text.tokenizer is None:
                raise RuntimeFailure(
                    "this bundle has no tokenizer, so it cannot read a prompt. "
                    "Export it again with text_encoder among --parts."
                )
            with timings.stage("load"):
                self._tokenizer = Tokenizer(
                    self.bundle.folder / text.tokenizer, text.max_length, text.pad_id, text.eos_id
                )
        with timings.stage("text"):
            tokens = self._tokenizer(prompt)
        encoder = self._graph("text_encoder", timings)
        start = perf_counter()
        dims = {"batch": 1, "text": tokens.input_ids.shape[1]}
        prompt_embeds = encoder.empty("prompt_embeds", **dims)
        encoder.run(
            {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}, {"prompt_embeds": prompt_embeds}
        )
        check_finite("text", prompt_embeds)
        seconds = perf_counter() - start
        timings.add("text", seconds)
        timings.report("text", 1, 1, seconds)
        return prompt_embeds, [tokens.warning] if tokens.warning else []

    def _denoise(self, prompt_embeds: NDArray[Any], settings: Settings, timings: Timings) -> NDArray[np.float32]:
        width = self.manifest.text.dim
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[0] != 1 or prompt_embeds.shape[2] != width:
            raise RuntimeFailure(
                f"prompt_embeds must be [1, text, {width}] for this bundle, not {list(prompt_embeds.shape)}."
            )
        key = (settings.latent_shape, prompt_embeds.shape[1])
        if self._loop is None or self._loop[0] != key:
            engines = self._graph("backbone", timings), self._graph("flow_head", timings)
            self._loop = None
            self._loop = key, DenoiseLoop(*engines, self.manifest, *key)
        return self._loop[1].run(prompt_embeds, settings, timings)

    def _decode(self, latents: NDArray[Any], timings: Timings) -> Iterator[NDArray[np.uint8]]:
        channels = self.manifest.latents.channels
        if latents.ndim != 5 or latents.shape[:2] != (1, channels) or 0 in latents.shape:
            raise RuntimeFailure(
                f"latents must be [1, {channels}, frames, height, width] for this bundle, not {list(latents.shape)}."
            )
        key = latents.shape[3:]
        if self._decoder is None or self._decoder[0] != key:
            first = self._graph("decoder_first", timings)
            self._decoder = None
            self._decoder = key, ChunkDecoder(first, self.manifest.latents, *key)
        yield from self._decoder[1].chunks(latents, lambda: self._graph("decoder_step", timings), timings)


@contextmanager
def _memory_failure(settings: Settings) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise RuntimeFailure(
            f"there is not enough memory for {settings.frames} frames of {settings.width}x{settings.height}. "
            "Choose fewer frames or a smaller size."
        ) from error
