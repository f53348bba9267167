"""What one call of `tmd-run` does for each prompt: make it, write it, and tell about it."""

from __future__ import annotations

import re
import unicodedata
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from ..errors import RuntimeFailure, UsageFailure

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..pipeline import Pipeline
    from ..result import Result
    from ..settings import Settings

_SLUG_LENGTH = 48


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

    def check_targets(self, count: int) -> None:
        """Fail now, not after minutes of work, if a result could not be written."""
        from ..files.target import Target
        from ..files.video import check_target

        for number in range(1, max(count, 1) + 1 if self.out else 2):
            check_target(self.target("video", 0, number))
        for number in range(1, max(count, 1) + 1 if self.preview else 1):
            check_target(self._numbered(self.preview, number))  # type: ignore[arg-type]  # there are none without it
        for number in range(1, max(count, 1) + 1):
            for path in filter(None, (self.save_embeds, self.save_latents)):
                Target(self._numbered(path, number), is_folder=False).discard()

    def target(self, prompt: str, seed: int, number: int) -> Path:
        """File of the prompt with this number (from 1)."""
        if self.out is None:
            return Path(f"{slug(prompt)}-{seed}{'.png' if self.stills else '.mp4'}")
        return self._numbered(self.out, number)

    def _numbered(self, path: Path, number: int) -> Path:
        if not self.numbered:
            return path
        if not path.name:
            raise UsageFailure(f"several prompts cannot all go to {path}: name a file or folder, such as video.mp4.")
        return path.with_name(f"{path.stem}-{number:03d}{path.suffix}")

    def run(self, pipeline: Pipeline, prompt: str) -> dict[str, Any]:
        """Make one video, print about it, and return its record for JSON. A model of classes has an empty prompt."""
        return self._make(pipeline, prompt, {})

    def run_embeds(self, pipeline: Pipeline, path: Path) -> dict[str, Any]:
        """As `run`, from an embeddings file in place of a prompt."""
        from ..files.tensor_files import load_embeds

        embeds = load_embeds(path, pipeline.manifest)
        given: dict[str, Any] = {"prompt_embeds": embeds.prompt_embeds}
        # A negative prompt that somebody asks for by name goes before the one in the file.
        if self.wishes.get("negative_prompt") is None:
            given["negative_embeds"] = embeds.negative_embeds
        settings = pipeline.settings(**self.wishes)
        stored = pipeline.manifest.text.null_embeds is not None and not settings.negative_prompt
        encodes = settings.passes == 2 and given.get("negative_embeds") is None and not stored
        if encodes and "text_encoder" not in pipeline.manifest.graphs:
            raise RuntimeFailure(
                f"guidance needs the embeddings of a negative prompt, which {path} does not hold, and this bundle has "
                "no text encoder to make them: save the embeddings again with guidance, or choose --guidance 1."
            )
        return self._make(pipeline, embeds.prompt, given)

    def decode(self, pipeline: Pipeline, path: Path) -> dict[str, Any]:
        """Decode a latents file; print about it, and return its record for JSON."""
        import numpy as np

        from ..files.png import describe
        from ..files.tensor_files import load_latents
        from ..files.video import open_video
        from ..memory import STAGES
        from ..result import Result
        from .progress import Bars, in_terminal

        start = perf_counter()
        saved = load_latents(path, pipeline.manifest)
        frames = (saved.latents.shape[2] - 1) * pipeline.manifest.latents.temporal_stride + 1
        # No class is drawn any more, but a model of classes has no settings without one.
        label = None if pipeline.manifest.model.classes is None else 0
        settings = pipeline.settings(frames=frames, size=saved.size, label=label)
        memory = pipeline.choose_memory(settings, unused=(*STAGES[0], *STAGES[1]))
        self.stills = settings.rule == "flow_map"
        target = self.target(saved.prompt, saved.seed, self.done + 1)
        texts = describe(saved, saved.model, saved.prompt)
        seconds = dict.fromkeys(("load", "text", "noise", "backbone", "flow_head", "decode"), 0.0)
        visible = in_terminal() and not self.quiet
        pieces = []
        with Bars(settings, visible, ("decode",)) as bars, open_video(target, settings.fps, texts) as video:
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
        )
        return self._finish(result, target, video.seconds, perf_counter() - start, {})

    def _make(self, pipeline: Pipeline, prompt: str, given: dict[str, Any]) -> dict[str, Any]:
        from ..autoencoder.picture import read_picture, start_size
        from ..files.png import describe
        from ..files.video import open_video
        from .progress import Bars, in_terminal

        wishes = dict(self.wishes)
        if self.init_latents is not None:
            from ..files.tensor_files import load_latents

            given = {**given, "init_latents": load_latents(self.init_latents, pipeline.manifest).latents}
        if self.image is not None:
            given = {**given, "image": read_picture(self.image)}
        wishes["size"] = start_size(
            pipeline.manifest, wishes.get("size"), given.get("image"), given.get("init_latents")
        )
        settings = pipeline.settings(**wishes)
        self.stills = settings.rule == "flow_map"
        wishes["seed"] = settings.seed
        files, hooks = self._extra_files(pipeline, prompt, settings)
        graphs = pipeline.manifest.graphs
        # As the pipeline has it: a bundle that cannot go on after a file that was asked for ends there.
        ends_early = ("embeds" in files and "backbone" not in graphs) or (
            "latents" in files and "decoder_first" not in graphs
        )
        name = prompt if settings.label is None else f"class {settings.label}"
        target = None if ends_early else self.target(name, settings.seed, self.done + 1)
        texts: dict[str, str] = {}
        start = perf_counter()
        with ExitStack() as stack:
            stages = ("backbone", "flow_head", "decode") if "prompt_embeds" in given else None
            bars = stack.enter_context(Bars(settings, in_terminal() and not self.quiet, stages))
            video = stack.enter_context(open_video(target, settings.fps, texts)) if target is not None else None

            def write(frames: NDArray[np.uint8]) -> None:
                # Only now is it known how many steps there were.
                texts.update(describe(pipeline.latest or settings, pipeline.manifest.model.name, prompt))
                if video is not None:
                    video.write(frames)

            result = pipeline(
                prompt, **wishes, **given, **hooks, callback=bars, on_frames=write if video is not None else None
            )
        return self._finish(result, target, video.seconds if video else 0.0, perf_counter() - start, files)

    def _extra_files(
        self, pipeline: Pipeline, prompt: str, settings: Settings
    ) -> tuple[dict[str, Path], dict[str, Any]]:
        """Files of embeddings and latents that this run shall leave behind, and what the pipeline calls with them."""
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

            def write_latents(values: NDArray[np.float32]) -> None:
                taken = pipeline.latest or settings
                latents = Latents(
                    latents=values,
                    model=pipeline.manifest.model.name,
                    prompt=prompt,
                    seed=settings.seed,
                    steps=taken.steps,
                    inner_steps=settings.inner_steps,
                    nfe=taken.nfe,
                    rule=settings.rule,
                    guidance=settings.guidance,
                    size=(settings.width, settings.height),
                    details=taken.details,
                )
                save_latents(latents_file, latents)

            hooks["on_latents"] = write_latents
        if self.preview is not None:
            from ..files.video import write_video

            preview_file = self._numbered(self.preview, self.done + 1)

            def write_preview(frames: NDArray[np.uint8]) -> None:
                write_video(preview_file, frames, settings.fps)
                files["preview"] = preview_file  # a run of one step has none

            hooks["on_preview"] = write_preview
        return files, hooks

    def _finish(
        self, result: Result, target: Path | None, file_seconds: float, seconds: float, files: dict[str, Path]
    ) -> dict[str, Any]:
        """Print about a result and return its record."""
        # The bundle was opened for the first prompt alone.
        total = seconds + self.opening_seconds
        result.stage_seconds["load"] += self.opening_seconds
        result.stage_seconds["file"] = file_seconds
        self.opening_seconds = 0.0
        self.done += 1
        for warning in result.warnings:
            if not self.quiet:
                click.echo(f"tmd-run: note: {warning}", err=True)
        if not self.quiet and not self.as_json:
            click.echo(_report(result, target, files))
        return _record(result, target, total, files)


def _report(result: Result, target: Path | None, files: dict[str, Path]) -> str:
    from .progress import LABELS

    seconds = {LABELS[stage]: value for stage, value in result.stage_seconds.items() if stage not in ("load", "noise")}
    times = ", ".join(f"{label} {_duration(value)}" for label, value in seconds.items())
    load = result.stage_seconds["load"]
    frames = f"{len(result.frames)} frames" if len(result.frames) > 1 else "1 frame"
    lines = []
    if target is not None:
        lines.append(f"{target}: {frames} of {result.width}x{result.height} at {result.fps} fps")
    lines += [f"{path}: {kind} of this run" for kind, path in files.items()]
    steps = f"{result.steps} x {result.inner_steps}" if result.rule == "transition" else f"{result.steps}"
    guidance = f", guidance {result.guidance:g}" if result.guidance != 1 else ""
    rho = f", rho {result.rho:g}" if result.rho else ""
    lines.append(f"  seed {result.seed}, steps {steps}{guidance}{rho}, NFE {result.nfe:.2f}")
    lines.append(f"  {times}" + (f" (and load {_duration(load)}, once)" if load else ""))
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _record(result: Result, target: Path | None, total: float, files: dict[str, Path]) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "prompt": result.prompt,
        "steps": result.steps,
        "inner_steps": result.inner_steps,
        "nfe": result.nfe,
        "frames": len(result.frames),
        "width": result.width,
        "height": result.height,
        "fps": result.fps,
        "stage_seconds": {stage: round(value, 6) for stage, value in result.stage_seconds.items()},
        "total_seconds": round(total, 6),
        "out": None if target is None else str(target),
        "warnings": list(result.warnings),
        "rule": result.rule,
        "guidance": result.guidance,
        "memory": result.memory,
        "embeds": str(files["embeds"]) if "embeds" in files else None,
        "latents": str(files["latents"]) if "latents" in files else None,
        "preview": str(files["preview"]) if "preview" in files else None,
        "times": list(result.times),
        "rho": result.rho,
    }


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
