"""Prompt -> frames: the stages of a bundle, put together.

    pipeline = tmd_runtime.load()                        # the built-in model; load("my-bundle") for another
    result = pipeline("a red circle moving right on a black background", seed=1)
    result.frames                                        # uint8 [F, H, W, 3]

Each stage is usable alone: `encode`, `denoise`, `decode`. A pipeline loads a graph when a stage first needs it and
keeps it, so only the first run is cold, unless memory is short (`memory.py`). Threads take turns with one pipeline;
`clone` makes another one that shares its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .autoencoder.frames import FrameDecoder, wishes_of
from .autoencoder.picture import encode_picture, start_size
from .built_in import locate
from .checks import (
    check_arrays,
    check_condition,
    check_embeds,
    check_hooks,
    check_latents,
    check_preview,
    check_prompt,
    check_start,
    memory_failure,
)
from .clock import Callback, Timings, no_seconds
from .errors import UsageFailure
from .graphs import Engines, Graphs, LastStage, last_stage
from .memory import DECODER, DENOISER, ENCODER, READER
from .result import Result
from .sampling import Denoised, Loop, family_of, resolve_settings
from .settings import MoreWishes, Settings
from .text.conditions import Conditions
from .turns import Turns, in_turn

if TYPE_CHECKING:
    from typing import Self, Unpack

    from tmd_engines import Bundle, Manifest
    from tmd_engines.cost.sizing import Memory


def load(
    bundle: str | Path | Bundle | None = None,
    engine: str = "auto",
    threads: int | None = None,
    device: str = "auto",
    memory: str = "auto",
    plans: str | Path | None = None,
) -> Pipeline:
    """Pipeline of a bundle (a folder, "builtin:NAME", or a `Bundle` already open; None: the built-in model).

    The whole bundle is checked here; its graphs are loaded by the stages. `engine` and `device` as in tmd_engines.load
    ("cpu", "cuda", "cuda:1"); `threads` limits the CPU threads of an engine. `memory` is "all" (graphs stay loaded),
    "low" (one stage after the other) or "auto" ("low" when "all" would not fit). `plans` is a folder that
    `tmd-engine build --out` made for the engine; plans are code, so take them from nobody whom you do not trust.
    Raises tmd_engines.BundleError if the bundle is not whole, RuntimeFailure if this installation has no built-in
    model, UsageFailure for an unknown built-in name, memory mode, engine or device, and for a pair of engine and device
    that does not go together.
    """
    from tmd_engines import Bundle

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(locate(bundle))
    return Pipeline(opened, engine, threads, device, memory, plans)


class Pipeline:
    """The stages of one bundle on one engine. Made by `load`."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str = "auto",
        threads: int | None = None,
        device: str = "auto",
        memory: str = "auto",
        plans: str | Path | None = None,
        *,
        engines: Engines | None = None,
    ) -> None:
        self.bundle, self._family = bundle, family_of(bundle.manifest)
        self._takes_picture = self._family.takes_picture(bundle.manifest)
        self._graphs = Graphs(bundle, engine, threads, device, memory, self._forget, engines, plans)
        self.turns, self.threads, self.forecast = Turns(), self._graphs.threads, self._graphs.forecast
        self._conditions = Conditions(bundle)
        # Buffers of the latest shape only: those of two sizes of a large model would not fit side by side.
        self._loop: tuple[Any, Loop] | None = None
        self._frames = FrameDecoder(self._graphs, bundle.manifest)

    def clone(self) -> Pipeline:
        """Another pipeline with the same weights (on a GPU: with its own) and buffers of its own, for another thread.

        What is loaded is freed when the last of them is closed, or needs it no more.
        """
        return Pipeline(self.bundle, *self._graphs.arguments, engines=self._graphs.shared)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def has_engines(self) -> bool:
        """Whether this machine has an engine for every graph of the bundle; loads none."""
        return self._graphs.are_here()

    def settings(
        self,
        seed: int | None = None,
        steps: int | None = None,
        inner_steps: int | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        **more: Unpack[MoreWishes],
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
        **more: Unpack[MoreWishes],
    ) -> Result:
        """Make one video. What is None comes from the bundle, the seed at random; `size` is (width, height) in pixels.

        `more` are guidance, negative_prompt, shift, schedule, deadline, strength, label, rho and fps (`Wishes`).
        `prompt_embeds` (and `negative_embeds`, where guidance is not 1) `[1, text, E]` take the place of the prompts; a
        model of classes takes a label and no prompt. `image` uint8 `[H, W, 3]`, or latents of one, `init_latents`
        `[1, C, 1, h, w]`, is the picture that a run with a strength starts from, or the first frame of the video of a
        model that holds one (Wan2.2-TI2V-5B, without a strength); without a `size`, in its own shape.
        `callback(StepInfo)` is called after every step; returning False stops the run. `on_embeds` gets the embeddings
        before denoising, `on_latents` the latents before decoding, `on_frames(uint8 [f, H, W, 3])` each piece of the
        video while the next one decodes, `on_preview(uint8 [F, H, W, 3])` before each step but the last what the run
        would give if it were the last; that changes nothing in the result. With `on_embeds` a bundle without backbone
        ends there, with `on_latents` one without decoder; the result then has no frames.
        Raises UsageFailure (bad wish), Cancelled, RuntimeFailure, or tmd_engines.EngineError; the pipeline stays usable
        after each.
        """
        check_arrays(init_latents=init_latents)
        check_hooks(on_latents)
        size = start_size(self.manifest, size, image, init_latents)
        return self.run(
            self.settings(seed, steps, inner_steps, frames, size, **more),
            prompt,
            last=last_stage(self.manifest, on_embeds is not None, on_latents is not None),
            callback=callback,
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds,
            image=image,
            init_latents=init_latents,
            on_embeds=on_embeds,
            on_denoised=None if on_latents is None else lambda denoised: on_latents(denoised.latents),
            on_frames=on_frames,
            on_preview=on_preview,
        )

    @in_turn
    def run(
        self,
        settings: Settings,
        prompt: str = "",
        *,
        last: LastStage = "decode",
        callback: Callback | None = None,
        prompt_embeds: NDArray[Any] | None = None,
        negative_embeds: NDArray[Any] | None = None,
        image: NDArray[np.uint8] | None = None,
        init_latents: NDArray[Any] | None = None,
        on_embeds: Callable[[NDArray[np.float32], NDArray[np.float32] | None], object] | None = None,
        on_denoised: Callable[[Denoised], object] | None = None,
        on_frames: Callable[[NDArray[np.uint8]], object] | None = None,
        on_preview: Callable[[NDArray[np.uint8]], object] | None = None,
    ) -> Result:
        """A call whose settings are resolved, up to the stage `last`; the result of an earlier end has no frames.

        `on_denoised` gets what the loop returned, before decoding; the rest is as in a call.
        """
        check_prompt(prompt)
        check_hooks(callback, on_embeds, on_denoised, on_frames, on_preview)
        check_arrays(prompt_embeds=prompt_embeds, negative_embeds=negative_embeds)
        check_start(self._takes_picture, settings, init_latents, image)
        check_condition(settings, prompt, prompt_embeds is not None)
        if prompt_embeds is not None:
            check_embeds(prompt_embeds, None, self.manifest.text.dim)
        self.prepare(settings, reads=prompt_embeds is None, encodes_image=image is not None, last=last)
        if on_preview is not None:
            check_preview(settings, self._graphs.memory)
        timings = Timings(callback, no_seconds())
        warnings = [*filter(None, [self._graphs.note]), *settings.warnings]
        made, earlier = settings, len(self._graphs.remarks)
        latents: NDArray[np.float32] | None = None
        pieces = [np.empty((0, settings.height, settings.width, 3), np.uint8)]
        with memory_failure(settings):
            if image is not None:
                size = settings.width, settings.height
                init_latents = self._encode_image(image, size, Timings(callback, timings.seconds))
            embeds = self._embed(prompt, prompt_embeds, negative_embeds, settings, timings, warnings)
            if on_embeds is not None and settings.label is None:
                on_embeds(*embeds)
            if last != "text":
                preview = None if on_preview is None else self._previewer(on_preview, timings)
                denoised = self._denoise(*embeds, settings, timings, preview, init_latents)
                latents, made = denoised.latents, settings.through(denoised.times)
                if on_denoised is not None:
                    on_denoised(denoised)
            if latents is not None and last == "decode":
                for piece in self._frames(latents, timings):
                    pieces.append(piece)
                    if on_frames is not None:
                        on_frames(piece)
            video = np.concatenate(pieces)
        return Result.of(
            made,
            video,
            prompt=prompt,
            latents=latents,
            stage_seconds=timings.seconds,
            warnings=(*warnings, *self._graphs.remarks[earlier:]),
            memory=self._graphs.memory,
            threads=self.threads,
        )

    def choose_memory(self, settings: Settings, unused: Collection[str] = ()) -> Memory:
        """With memory "auto", settle whether graphs stay loaded in the runs to come; `unused` graphs do not count.

        A run does this itself. Raises RuntimeFailure if such a run would not fit at all. Returns the mode.
        """
        return self._graphs.choose_memory(settings, unused)

    def prepare(
        self, settings: Settings, *, reads: bool = True, encodes_image: bool = False, last: LastStage = "decode"
    ) -> None:
        """Settles the memory mode of such a run, and begins to load its graphs if they are small.

        A run does this itself; a caller with something else to do before the run has it done meanwhile. `reads`: it
        starts from a prompt. Raises as `choose_memory`.
        """
        unused = (*(() if reads else READER), *(() if encodes_image else ENCODER))
        self.choose_memory(settings, unused)
        later = {"text": (*DENOISER, *DECODER), "denoise": DECODER, "decode": ()}[last]
        if settings.label is not None:
            later = (*READER, *later)
        if settings.latent_shape[2] == 1:
            later = (*later, DECODER[1])
        self._graphs.load_ahead((*unused, *later))
        import numpy.random  # noqa: F401  # which the noise needs, and numpy loads late

    def encodes_negative(self, settings: Settings, negative_embeds: NDArray[Any] | None) -> bool:
        """Whether a run with these settings needs the text encoder for its negative prompt."""
        return settings.passes == 2 and negative_embeds is None and not self._conditions.stores_negative(settings)

    @in_turn
    def check_prompt(self, prompt: str) -> None:
        """Raises UsageFailure for a prompt that has nothing to read; loads the tokenizer alone."""
        check_prompt(prompt)
        self._conditions.encoder.tokens(prompt, Timings())

    @in_turn
    def encode(self, prompt: str) -> NDArray[np.float32]:
        """Prompt embeddings float32 `[1, text, E]`.

        Raises UsageFailure for an empty prompt, RuntimeFailure if the bundle has no text encoder.
        """
        check_prompt(prompt)
        timings = Timings()
        with self._graphs.stage("text_encoder"):
            return self._conditions.encoder(prompt, lambda: self._graphs.load("text_encoder", timings), timings)[0]

    @in_turn
    def encode_image(
        self,
        image: NDArray[np.uint8],
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        seconds: dict[str, float] | None = None,
    ) -> NDArray[np.float32]:
        """Latents `[1, C, 1, h, w]` of a picture, uint8 `[H, W, 3]`: of its middle, scaled to `size` (width, height).

        Without a size, in its own shape with about as many pixels as the model was made for. `seconds` as in
        `decode_chunks`. Raises as a run does.
        """
        return self._encode_image(image, size, Timings(callback, seconds))

    def _encode_image(
        self, image: NDArray[np.uint8], size: tuple[int, int] | None, timings: Timings
    ) -> NDArray[np.float32]:
        with self._graphs.stage("encoder"):
            return encode_picture(lambda: self._graphs.load("encoder", timings), self.manifest, image, size, timings)

    @in_turn
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
        **more: Unpack[MoreWishes],
    ) -> NDArray[np.float32]:
        """Latents `[1, C, T, h, w]` float32, normalised (mean 0, deviation 1), from the embeddings of `encode`, or from
        None for a model of classes.

        With guidance other than 1, `negative_embeds` of the same shape are needed, unless those of the empty prompt lie
        in the bundle; they may then have another length too. Raises as a run does.
        """
        size = start_size(self.manifest, size, None, init_latents)
        settings = self.settings(seed, steps, inner_steps, frames, size, **more)
        check_start(self._takes_picture, settings, init_latents)
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
        self.choose_memory(settings, unused=(*READER, *DECODER, *ENCODER))
        with memory_failure(settings):
            timings = Timings(callback)
            return self._denoise(prompt_embeds, negative_embeds, settings, timings, None, init_latents).latents

    def decode(self, latents: NDArray[Any]) -> NDArray[np.uint8]:
        """Frames uint8 `[F, H, W, 3]` of latents `[1, C, T, h, w]` from `denoise`."""
        return np.concatenate(list(self.decode_chunks(latents)))

    def decode_chunks(
        self, latents: NDArray[Any], callback: Callback | None = None, seconds: dict[str, float] | None = None
    ) -> Iterator[NDArray[np.uint8]]:
        """As `decode`, in pieces: one frame, then a few for each further latent frame. Each is the caller's own.

        `seconds`, if given, is filled with what `load` and `decode` took. Raises RuntimeFailure for other shapes, and
        where the memory of this machine is too small.
        """
        with self.turns.take(), self._room_for(latents):
            yield from self._frames(latents, Timings(callback, seconds))

    @contextmanager
    def _room_for(self, latents: NDArray[Any]) -> Iterator[None]:
        """Settles the memory mode of a decoding, and names its size where memory ends."""
        check_latents(latents, self.manifest.latents.channels)
        try:
            settings = self.settings(**wishes_of(latents, self.manifest))
        except UsageFailure:  # a size that the decoder takes and no run has: nothing tells what it needs
            yield
            return
        self.choose_memory(settings, unused=(*READER, *DENOISER, *ENCODER))
        with memory_failure(settings):
            yield

    def close(self) -> None:
        """Give the engines and buffers back. A later run loads them again."""
        with self.turns.take(again=True):
            self._graphs.close()
            self._conditions.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self, graphs: set[str]) -> None:
        """Lets go of what is bound to engines that are about to be closed."""
        if graphs & set(DENOISER):
            self._loop = None
        if graphs & set(DECODER):
            self._frames.forget()

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
        with self._graphs.stage("text_encoder"):
            return self._conditions(
                prompt,
                prompt_embeds,
                negative_embeds,
                settings,
                lambda: self._graphs.load("text_encoder", timings),
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
    ) -> Denoised:
        labelled = settings.label is not None
        if not labelled:
            prompt_embeds, negative_embeds = self._conditions.same_length(prompt_embeds, negative_embeds)
            check_embeds(prompt_embeds, negative_embeds, self.manifest.text.dim)
        with self._graphs.stage("backbone"):
            key = (settings.latent_shape, 1 if labelled else prompt_embeds.shape[1])
            previous = self._loop
            if previous is None or previous[0] != key:
                backbone, flow_head, update = (self._graphs.load(name, timings) for name in DENOISER)
                same_size = previous is not None and previous[0][0] == key[0]
                if not (same_size and self.manifest.family.keeps_prompt_length):
                    previous = None  # only for a prompt of another length it holds what an engine compiled for the size
                self._loop = None
                with timings.stage("load"):  # an engine may compile where it is bound
                    self._loop = key, self._family.loop(backbone, flow_head, update, self.manifest, *key)
                self._family.take_turns(self._loop[1], self._graphs.transformer)
            assert self._loop is not None
            denoised = self._loop[1].run(prompt_embeds, settings, timings, negative_embeds, on_preview, init)
            del previous
            return denoised

    def _previewer(
        self, on_preview: Callable[[NDArray[np.uint8]], object], timings: Timings
    ) -> Callable[[NDArray[np.float32]], object]:
        """Decodes the latents of a preview for `on_preview`; its seconds count as `decode`, its steps as none."""
        silent = Timings(seconds=timings.seconds)
        return lambda latents: on_preview(np.concatenate(list(self._frames(latents, silent))))
