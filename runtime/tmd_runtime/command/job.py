"""What one call of `tmd-run` does for each prompt: make it, write it, and tell about it."""

from __future__ import annotations

import re
import unicodedata
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tmd_engines.command.program import sweep
from tmd_engines.command.screen import clean, say, tell

from ..errors import RuntimeFailure, UsageFailure
from .report import about, record, report

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..clock import StepInfo
    from ..pipeline import Pipeline
    from ..result import Result
    from ..sampling import Denoised
    from ..settings import Settings

_SLUG_LENGTH = 48
_LONG_SECONDS = 600.0


@dataclass
class Job:
    """What all prompts of one call share: the wishes for the pipeline, where results go and what is printed."""

    wishes: dict[str, Any]
    out: Path | None
    numbered: bool
    quiet: bool
    as_json: bool
    save_embeds: Path | None = None
    save_latents: Path | None = None
    image: Path | None = None
    init_latents: Path | None = None
    preview: Path | None = None
    opening_seconds: float = 0.0
    done: int = 0
    stills: bool = False
    _written: set[Path] = field(default_factory=set)

    def check_targets(self, count: int) -> None:
        """Fail now, not after minutes of work, if a result could not be written."""
        from ..files.target import Target
        from ..files.video import check_target

        self._sweep()
        for number in range(1, max(count, 1) + 1 if self.out else 2):
            check_target(self.target("video", 0, number))
        for number in range(1, max(count, 1) + 1 if self.preview else 1):
            check_target(self._numbered(self.preview, number))  # type: ignore[arg-type]  # there are none without it
        for number in range(1, max(count, 1) + 1):
            for path in filter(None, (self.save_embeds, self.save_latents)):
                Target(self._numbered(path, number), is_folder=False).discard()

    def _sweep(self) -> None:
        """Removes what killed runs left where this one writes, and says so."""
        outputs = [self.out or Path("video"), self.save_embeds, self.save_latents, self.preview]
        sweep("tmd-run", (place for path in outputs if path is not None for place in (path.parent, path)), self.quiet)

    def target(self, prompt: str, seed: int, number: int) -> Path:
        """File of the prompt with this number (from 1). Prompts that begin alike have one slug, and still two files."""
        if self.out is not None:
            return self._numbered(self.out, number)
        name, ending = f"{slug(prompt)}-{seed}", ".png" if self.stills else ".mp4"
        path, times = Path(name + ending), 1
        while path in self._written:
            times += 1
            path = Path(f"{name}-{times}{ending}")
        return path

    def _target(self, prompt: str, settings: Settings, seed: int) -> Path:
        """The next file, in a format that holds such a video. Raises UsageFailure."""
        from ..files.video import check_form

        target = self.target(prompt, seed, self.done + 1)
        check_form(target, settings.fps, settings.frames, settings.width, settings.height)
        return target

    def _numbered(self, path: Path, number: int) -> Path:
        if not self.numbered:
            return path
        if not path.name:
            raise UsageFailure(f"several prompts cannot all go to {path}: name a file or folder, such as video.mp4.")
        return path.with_name(f"{path.stem}-{number:03d}{path.suffix}")

    def run(self, pipeline: Pipeline, prompt: str) -> dict[str, Any]:
        """Make one video, print about it, and return its record for JSON. A model of classes has an empty prompt."""
        start = self._start(pipeline)
        return self._make(pipeline, self._settings(pipeline, start), prompt, start)

    def run_embeds(self, pipeline: Pipeline, path: Path) -> dict[str, Any]:
        """As `run`, from an embeddings file in place of a prompt."""
        from ..files.tensor_files import load_embeds

        embeds = load_embeds(path, pipeline.manifest)
        # A negative prompt that somebody asks for by name goes before the one in the file.
        negative = embeds.negative_embeds if self.wishes.get("negative_prompt") is None else None
        start = self._start(pipeline)
        settings = self._settings(pipeline, start)
        if pipeline.encodes_negative(settings, negative) and "text_encoder" not in pipeline.manifest.graphs:
            raise RuntimeFailure(
                f"guidance needs the embeddings of a negative prompt, which {path} does not hold, and this bundle has "
                "no text encoder to make them: save the embeddings again with guidance, or choose --guidance 1."
            )
        inputs = {**start, "prompt_embeds": embeds.prompt_embeds, "negative_embeds": negative}
        return self._make(pipeline, settings, embeds.prompt, inputs)

    def decode(self, pipeline: Pipeline, path: Path) -> dict[str, Any]:
        """Decode a latents file; print about it, and return its record for JSON."""
        import numpy as np

        from ..autoencoder.frames import wishes_of
        from ..clock import no_seconds
        from ..files.png import describe
        from ..files.tensor_files import load_latents
        from ..files.video import open_video
        from ..memory import DENOISER, ENCODER, READER
        from ..result import Result
        from .progress import watch

        start = perf_counter()
        saved = load_latents(path, pipeline.manifest)
        settings = pipeline.settings(**wishes_of(saved.latents, pipeline.manifest), fps=self.wishes.get("fps"))
        memory = pipeline.choose_memory(settings, unused=(*READER, *DENOISER, *ENCODER))
        self.stills = pipeline.manifest.family.makes_stills
        target = self._target(saved.prompt, settings, saved.seed)
        texts = describe(saved, saved.model, saved.prompt)
        seconds = no_seconds()
        pieces = []
        bars = watch({"decode": settings.latent_shape[2]}, self.quiet)
        with bars, open_video(target, settings.fps, texts) as video:
            for piece in pipeline.decode_chunks(saved.latents, bars, seconds):
                pieces.append(piece)
                video.write(piece)
        result = Result(
            frames=np.concatenate(pieces),
            fps=settings.fps,
            prompt=saved.prompt,
            seed=saved.seed,
            steps=saved.steps,
            inner_steps=saved.inner_steps,
            nfe=saved.nfe,
            stage_seconds=seconds,
            rule=saved.rule,
            guidance=saved.guidance,
            memory=memory,
            threads=pipeline.threads,
        )
        return self._finish(pipeline, result, target, video.seconds, perf_counter() - start, {})

    def _start(self, pipeline: Pipeline) -> dict[str, Any]:
        """The picture that the runs start from, by the name that the pipeline has for it."""
        from ..autoencoder.picture import read_picture
        from ..files.tensor_files import load_latents

        if self.init_latents is not None:
            return {"init_latents": load_latents(self.init_latents, pipeline.manifest).latents}
        return {} if self.image is None else {"image": read_picture(self.image)}

    def _settings(self, pipeline: Pipeline, start: dict[str, Any]) -> Settings:
        from ..autoencoder.picture import start_size

        size = start_size(pipeline.manifest, self.wishes.get("size"), **start)
        return pipeline.settings(**{**self.wishes, "size": size})

    def _make(self, pipeline: Pipeline, settings: Settings, prompt: str, inputs: dict[str, Any]) -> dict[str, Any]:
        from ..files.png import describe
        from ..files.video import open_video
        from ..graphs import last_stage
        from .progress import steps_of, watch

        self.stills = pipeline.manifest.family.makes_stills
        last = last_stage(pipeline.manifest, self.save_embeds is not None, self.save_latents is not None)
        name = prompt if settings.label is None else f"class {settings.label}"
        target = self._target(name, settings, settings.seed) if last == "decode" else None
        files, hooks = self._extra_files(pipeline, prompt, settings)
        save_latents = hooks.pop("save_latents", None)
        texts: dict[str, str] = {}

        def denoised(made: Denoised) -> None:
            # Only now is it known how many steps there were.
            taken = settings.through(made.times)
            texts.update(describe(taken, pipeline.manifest.model.name, prompt))
            if save_latents is not None:
                save_latents(made.latents, taken)

        totals = steps_of(pipeline.manifest, settings, reads="prompt_embeds" not in inputs)
        begin = perf_counter()
        pipeline.prepare(settings, reads="prompt_embeds" not in inputs, encodes_image="image" in inputs, last=last)
        estimated = self._foretell(pipeline, settings, "image" in inputs)
        with ExitStack() as stack:
            bars = watch(totals, self.quiet)
            stack.enter_context(bars)
            video = stack.enter_context(open_video(target, settings.fps, texts)) if target is not None else None

            def step(info: StepInfo) -> None:
                if video is not None:
                    video.check()  # not after minutes of work
                bars(info)

            result = pipeline.run(
                settings,
                prompt,
                last=last,
                callback=step,
                on_denoised=denoised,
                on_frames=video.write if video is not None else None,
                **inputs,
                **hooks,
            )
        file_seconds = video.seconds if video is not None else 0.0
        if len(result.frames):
            pipeline.forecast.learn(settings, result.stage_seconds, "image" in inputs)
        return self._finish(pipeline, result, target, file_seconds, perf_counter() - begin, files, estimated)

    def _foretell(self, pipeline: Pipeline, settings: Settings, encodes_image: bool) -> float | None:
        """How many seconds the run will take, as far as that can be told, and tells it."""
        seconds = pipeline.forecast.seconds(settings, encodes_image) if pipeline.has_engines() else None
        if seconds is not None and not self.quiet:
            if seconds > _LONG_SECONDS:
                remedy = "Fewer steps, fewer frames or a smaller size take less."
                tell(f"tmd-run: note: this run will take {about(seconds)} on this machine. {remedy}")
            else:
                tell(f"tmd-run: this run will take {about(seconds)}")
        return seconds

    def _extra_files(
        self, pipeline: Pipeline, prompt: str, settings: Settings
    ) -> tuple[dict[str, Path], dict[str, Any]]:
        """Files that this run shall leave beside its video, and the functions that write them, by their hooks."""
        from ..files.tensor_files import Embeddings, Latents, save_embeds, save_latents

        files: dict[str, Path] = {}
        hooks: dict[str, Any] = {}
        if self.save_embeds is not None:
            embeds_file = files["embeds"] = self._numbered(self.save_embeds, self.done + 1)

            def write_embeds(positive: NDArray[np.float32], negative: NDArray[np.float32] | None) -> None:
                embeds = Embeddings(prompt, positive, settings.negative_prompt, negative)
                save_embeds(embeds_file, embeds, pipeline.manifest)

            hooks["on_embeds"] = write_embeds
        if self.save_latents is not None:
            latents_file = files["latents"] = self._numbered(self.save_latents, self.done + 1)

            def write_latents(values: NDArray[np.float32], taken: Settings) -> None:
                save_latents(latents_file, Latents.of(taken, values, pipeline.manifest.model.name, prompt))

            hooks["save_latents"] = write_latents
        if self.preview is not None:
            from ..files.video import check_form, write_video

            preview_file = self._numbered(self.preview, self.done + 1)
            check_form(preview_file, settings.fps, settings.frames, settings.width, settings.height)

            def write_preview(frames: NDArray[np.uint8]) -> None:
                write_video(preview_file, frames, settings.fps)
                files["preview"] = preview_file  # a run of one step has none

            hooks["on_preview"] = write_preview
        return files, hooks

    def _finish(
        self,
        pipeline: Pipeline,
        result: Result,
        target: Path | None,
        file_seconds: float,
        seconds: float,
        files: dict[str, Path],
        estimated: float | None = None,
    ) -> dict[str, Any]:
        """Print about a result and return its record."""
        # The bundle was opened for the first prompt alone.
        total = seconds + self.opening_seconds
        result.stage_seconds["load"] += self.opening_seconds
        result.stage_seconds["file"] = file_seconds
        self.opening_seconds = 0.0
        self.done += 1
        if target is not None:
            self._written.add(target)
        for warning in result.warnings:
            if not self.quiet:
                tell(f"tmd-run: note: {warning}")
        if not self.quiet and not self.as_json:
            has_inner_steps = pipeline.manifest.family.inner_steps(pipeline.manifest.sampler) is not None
            say(clean(report(result, has_inner_steps, target, files)))
        return record(result, target, total, files, estimated)


def slug(prompt: str) -> str:
    """A file name from a prompt: its letters and digits, words joined by '-', cut between words."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    name = ""
    for word in words:
        # Counted in bytes: file systems allow 255 of them, and a letter may take four.
        longer = f"{name}-{word}" if name else word.encode()[:_SLUG_LENGTH].decode(errors="ignore")
        if len(longer.encode()) > _SLUG_LENGTH:
            break
        name = longer
    return name or "video"
