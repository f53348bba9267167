"""The contender that is this project: a bundle on one engine, through the Python runtime."""

from __future__ import annotations

from time import perf_counter, process_time
from typing import Any

import numpy as np

import tmd_runtime

from .spec import Work


class BundleRun:
    """A whole run of a bundle: text (if it has an encoder), the denoising loop, the decoder (if it has one)."""

    def __init__(self, work: Work, engine: str) -> None:
        self._work, self._engine = work, engine

    def load(self) -> dict[str, float]:
        """Opens the bundle; the graphs load in the first run."""
        start = perf_counter()
        work = self._work
        self._pipeline = tmd_runtime.load(work.bundle, engine=self._engine, threads=work.threads)
        manifest = self._pipeline.manifest
        random = np.random.default_rng(work.seed)
        self._embeds = None
        if "text_encoder" not in manifest.graphs:
            self._embeds = random.standard_normal((1, manifest.text.max_length, manifest.text.dim), np.float32)
        if work.stages == ("decode",):
            latents = manifest.latents
            frames, stride = 1 + (work.frames - 1) // latents.temporal_stride, latents.spatial_stride
            shape = (1, latents.channels, frames, work.height // stride, work.width // stride)
            self._latents = random.standard_normal(shape, np.float32)
        return {"open": perf_counter() - start}

    def run(self) -> dict[str, float]:
        """Seconds by stage. `denoise` is the loop from embeddings to latents, of which `host` is not the engines'.

        `cpu`: what the loop took of the processor, on all threads together (of the first run: loading too). A stage
        that is measured alone has only its own seconds.
        """
        work = self._work
        if "denoise" not in work.stages:
            return self._stage_alone()
        marks: dict[str, float] = {}
        cpu: dict[str, float] = {}

        def mark(name: str) -> Any:
            def reached(*_: Any) -> None:
                marks[name], cpu[name] = perf_counter(), process_time()

            return reached

        def listen(step: tmd_runtime.StepInfo) -> None:
            if step.stage == "load" and "embeds" in marks and "latents" not in marks:
                marks["loading"] = marks.get("loading", 0.0) + step.seconds

        result = self._pipeline(
            work.prompt, work.seed, work.steps, work.inner_steps, work.frames, (work.width, work.height),
            prompt_embeds=self._embeds, on_embeds=mark("embeds"), on_latents=mark("latents"), callback=listen,
            guidance=1.0,
        )  # fmt: skip
        seconds = dict(result.stage_seconds)
        denoise = marks["latents"] - marks["embeds"] - marks.get("loading", 0.0)
        shown = {name: seconds[name] for name in ("load", "text", "backbone", "flow_head", "decode") if seconds[name]}
        host = max(0.0, denoise - seconds["backbone"] - seconds["flow_head"])
        return {**shown, "denoise": denoise, "host": host, "cpu": cpu["latents"] - cpu["embeds"]}

    def _stage_alone(self) -> dict[str, float]:
        work, (stage,) = self._work, self._work.stages
        start, cpu = perf_counter(), process_time()
        if stage == "text":
            self._pipeline.encode(work.prompt)
        else:
            self._pipeline.decode(self._latents)
        return {stage: perf_counter() - start, "cpu": process_time() - cpu}
