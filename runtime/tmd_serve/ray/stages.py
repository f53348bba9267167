"""The three stages of a run as a replica does them: a job in, large arrays taken from and put into the object store."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines import unfinished
from tmd_runtime import Result
from tmd_runtime.autoencoder.picture import read_picture
from tmd_runtime.files.png import describe
from tmd_runtime.files.video import open_video

from ..files import PICTURE
from ..local.embeds import Embedded, EmbedsCache
from ..local.library import Library
from ..local.output import STILL, VIDEO, preview, record, write_thumbnail
from .messages import Made, Preview, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tmd_runtime import Pipeline, Settings, StepInfo
    from tmd_runtime.sampling import Denoised

    from ..files import DataFolder
    from ..jobs import Job
    from ..local.model import Model
    from .threads import Send


class Stage:
    """What the three have in common: models by name, and the pipelines of those that ran last."""

    def __init__(self, models: dict[str, Model], files: DataFolder, most_loaded: int | None = None) -> None:
        self._models, self._files = models, files
        self._library = Library(None, most_loaded)

    def _open(self, job: Job) -> tuple[Pipeline, Settings]:
        model = self._models[job.model]
        settings = model.settings(job.request["wishes"])
        return self._library.pipeline(model, settings), settings


class TextStage(Stage):
    """Prompts -> embeddings; recent ones are kept."""

    def __init__(self, models: dict[str, Model], files: DataFolder, most_loaded: int | None = None) -> None:
        super().__init__(models, files, most_loaded)
        self._recent = EmbedsCache()

    def run(self, job: Job, send: Send, put: Callable[[Any], Any]) -> Made:
        """The box holds an `Embedded`."""
        pipeline, settings = self._open(job)
        key = job.model, job.request["prompt"], settings.negative_prompt if settings.passes == 2 else None
        known = self._recent.get(key)
        if known is not None:
            return Made((put(known),), {}, known.warnings)
        fresh: list[tuple[NDArray[np.float32], NDArray[np.float32] | None]] = []
        result = pipeline.run(
            settings,
            job.request["prompt"],
            last="text",
            callback=_steps(send),
            on_embeds=lambda positive, negative: fresh.append((positive, negative)),
        )
        warnings = tuple(warning for warning in result.warnings if warning not in settings.warnings)
        made = Embedded(*fresh[0], warnings)
        self._recent.put(key, made)
        return Made((put(made),), result.stage_seconds, warnings)


class DenoiseStage(Stage):
    """Embeddings -> latents. A picture that a run starts from is encoded here, and previews are decoded here."""

    def run(self, job: Job, embedded: Embedded | None, send: Send, put: Callable[[Any], Any]) -> Made:
        """The box holds latents float32 `[1, C, T, h, w]`; `about` has the times that the run went through."""
        pipeline, settings = self._open(job)
        pictured = bool(job.request["picture"])
        previews = job.request["preview"]
        ends: list[Denoised] = []
        result = pipeline.run(
            settings,
            "",
            last="denoise",
            callback=_steps(send),
            prompt_embeds=None if embedded is None else embedded.positive,
            negative_embeds=None if embedded is None else embedded.negative,
            image=read_picture(self._files.folder(job.id) / PICTURE) if pictured else None,
            on_denoised=ends.append,
            on_preview=(lambda frames: send(Preview(preview(frames)))) if previews else None,
        )
        warnings = tuple(warning for warning in result.warnings if warning not in settings.warnings)
        about = {"times": list(ends[0].times), "memory": result.memory, "threads": result.threads}
        return Made((put(ends[0].latents),), result.stage_seconds, warnings, about)


class DecodeStage(Stage):
    """Latents -> the job's files."""

    def run(self, job: Job, latents: NDArray[np.float32], denoised: Made, send: Send) -> Made:
        """`about` is `Job.result`, whose seconds are of this stage alone."""
        start = perf_counter()
        pipeline, settings = self._open(job)
        made = settings.through(tuple(denoised.about["times"]))
        model = self._models[job.model]
        name = STILL if model.card.makes_stills else VIDEO
        folder = self._files.make(job.id)
        unfinished.sweep(folder)
        prompt, pieces, seconds = job.request["prompt"], [], dict[str, float]()
        texts = describe(made, pipeline.manifest.model.name, prompt)
        with open_video(folder / name, settings.fps, texts) as video:
            for piece in pipeline.decode_chunks(latents, _steps(send), seconds):
                pieces.append(piece)
                video.write(piece)
        seconds["file"] = video.seconds
        frames = np.concatenate(pieces)
        result = Result.of(
            made,
            frames,
            prompt=prompt,
            stage_seconds=seconds,
            memory=denoised.about["memory"],
            threads=denoised.about["threads"],
        )
        write_thumbnail(self._files, job.id, frames)
        about = record(self._files, job.id, name, result, settings.warnings, perf_counter() - start)
        return Made((), seconds, (), about)


def _steps(send: Send) -> Callable[[StepInfo], bool]:
    return lambda info: send(Step(*info))
