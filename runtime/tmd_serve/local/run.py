"""One run of one job: its pipeline, its hooks, its files. The file is what `tmd-run` writes with these settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tmd_engines import unfinished
from tmd_engines.device.running import stop_step
from tmd_runtime.autoencoder.picture import read_picture
from tmd_runtime.command.progress import steps_of
from tmd_runtime.files.png import describe
from tmd_runtime.files.video import open_video
from tmd_runtime.memory import ENCODER

from ..files import PICTURE, DataFolder
from .embeds import Embedded, EmbedsCache
from .meter import Meter
from .output import STILL, VIDEO, preview, record, write_thumbnail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tmd_runtime import Pipeline, Result, Settings
    from tmd_runtime.sampling import Denoised

    from ..jobs import Job, Progress
    from .library import Library
    from .model import Model

_LEFT_OUT = "previews were left out: they need the decoder beside the model, and only one stage after the other fits."


class Runner:
    """Runs jobs one after the other, for one thread; keeps models, embeddings and timings between them."""

    def __init__(self, models: dict[str, Model], library: Library, files: DataFolder, embeds: EmbedsCache) -> None:
        self._models, self._library, self._files, self.embeds = models, library, files, embeds
        self._seconds: dict[str, dict[str, float]] = {}  # group -> stage -> seconds of its latest run

    def make(self, job: Job, show: Callable[[Progress], bool], on_preview: Callable[[bytes], object]) -> dict[str, Any]:
        """See `Runs.make`."""
        start = perf_counter()
        model = self._models[job.model]
        settings = model.settings(job.request["wishes"])
        pipeline = self._library.pipeline(model, settings)
        folder = self._files.make(job.id)
        unfinished.sweep(folder)
        image = read_picture(folder / PICTURE) if job.request["picture"] else None
        previews, notes = self._previews(job, pipeline, settings, on_preview, image is not None)
        key = job.model, job.request["prompt"], settings.negative_prompt if settings.passes == 2 else None
        known = self.embeds.get(key) if settings.label is None else None
        meter = Meter(
            steps_of(pipeline.manifest, settings, reads=known is None and settings.label is None),
            self._seconds.get(job.group),
            job.estimated_seconds,
            show,
        )
        name = STILL if model.card.makes_stills else VIDEO
        fresh: list[Embedded] = []
        result = self._write(
            pipeline,
            settings,
            job,
            folder / name,
            callback=meter,
            image=image,
            on_preview=previews,
            prompt_embeds=None if known is None else known.positive,
            negative_embeds=None if known is None else known.negative,
            on_embeds=lambda positive, negative: fresh.append(Embedded(positive, negative)),
        )
        pipeline.forecast.learn(settings, result.stage_seconds, image is not None)
        self._seconds[job.group] = result.stage_seconds
        warnings = [*result.warnings, *notes]
        if known is not None:
            warnings += [warning for warning in known.warnings if warning not in warnings]
        elif fresh:
            spoken = tuple(warning for warning in result.warnings if warning not in settings.warnings)
            self.embeds.put(key, Embedded(fresh[0].positive, fresh[0].negative, spoken))
        write_thumbnail(self._files, job.id, result.frames)
        return record(self._files, job.id, name, result, warnings, perf_counter() - start)

    def _write(self, pipeline: Pipeline, settings: Settings, job: Job, path: Path, **hooks: Any) -> Result:
        """The run itself; its frames go into the file while the next ones decode."""
        texts: dict[str, str] = {}
        prompt = job.request["prompt"]

        def denoised(made: Denoised) -> None:
            # Only now is it known how many steps there were.
            texts.update(describe(settings.through(made.times), pipeline.manifest.model.name, prompt))

        with open_video(path, settings.fps, texts) as video:
            result = pipeline.run(settings, prompt, on_denoised=denoised, on_frames=video.write, **hooks)
        result.stage_seconds["file"] = video.seconds
        return result

    def _previews(
        self, job: Job, pipeline: Pipeline, settings: Settings, show: Callable[[bytes], object], pictured: bool
    ) -> tuple[Callable[[NDArray[np.uint8]], object] | None, list[str]]:
        """The hook for previews where they are asked for and possible, and what to say if they are not."""
        if not job.request["preview"]:
            return None, []
        if pipeline.choose_memory(settings, () if pictured else ENCODER) == "low":
            return None, [_LEFT_OUT]
        return lambda frames: show(preview(frames)), []

    def interrupt(self, thread: int) -> None:
        """See `Runs.interrupt`."""
        stop_step(thread)

    def close(self) -> None:
        """Gives what is loaded back."""
        self._library.close()
