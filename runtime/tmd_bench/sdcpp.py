"""stable-diffusion.cpp (ggml), through the package `stable-diffusion-cpp-python`: the runtime that most people run Wan
with where there is no GPU. Found when it is asked for, never needed otherwise.

It has no flow head: its loop takes full passes, whose time is scaled to the same number of evaluations. Its transformer
and its autoencoder are loaded in every run, whichever stage is measured.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from .published import TEXT_ENCODER, TRANSFORMER, VAE
from .rivals import evaluations, source_of
from .spec import Work

TYPES = {"fp32": "f32", "fp16": "f16", "bf16": "f16"}
"""Our precision -> the type of its weights; whatever has 8 bits or fewer becomes q8_0."""

# What it logs when a stage is over.
_ENDS = {"get_learned_condition completed": "text", "sampling completed": "denoise",
         "decode_first_stage completed": "decode"}  # fmt: skip
_SMALLEST = 64  # pixels, where only the text encoder is of interest


class StableDiffusionCpp:
    """A contender; see `worker`."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._ends: dict[str, tuple[float, float]] = {}

    def load(self) -> dict[str, float]:
        """Raises ValueError if the package is missing or does not take the files."""
        try:
            import stable_diffusion_cpp as package
        except ImportError as error:
            raise ValueError(
                f"it cannot be imported ({error}). Build it for this machine: pip install stable-diffusion-cpp-python"
            ) from None
        work = self._work
        if work.published is None:
            raise ValueError("it needs the model's weights: give --model.")
        folder, start = Path(work.published), perf_counter()
        self._model: Any = package.StableDiffusion(
            diffusion_model_path=str(folder / TRANSFORMER),
            vae_path=str(folder / VAE),
            t5xxl_path=str(folder / TEXT_ENCODER) if "text" in work.stages else "",
            wtype=TYPES.get(work.precision, "q8_0"),
            n_threads=work.threads,
            diffusion_flash_attn=True,
            verbose=False,
        )
        self._listener = package.sd_log_callback(self._listen)  # kept: only ctypes' side knows it
        package.sd_set_log_callback(self._listener, ctypes.c_void_p(0))
        return {"load": perf_counter() - start}

    def run(self) -> dict[str, float]:
        work = self._work
        nfe = evaluations(work, source_of(work))
        passes = math.ceil(nfe) if "denoise" in work.stages else 1
        only_text = work.stages == ("text",)
        self._ends = {"start": (perf_counter(), process_time())}
        frames = self._model.generate_video(
            prompt=work.prompt, seed=work.seed, cfg_scale=1.0, sample_method="euler", flow_shift=3.0,
            sample_steps=passes, video_frames=1 if only_text else work.frames,
            width=_SMALLEST if only_text else work.width, height=_SMALLEST if only_text else work.height,
        )  # fmt: skip
        if not frames or len(self._ends) != 4:
            raise ValueError(f"it drew {len(frames or ())} frames and finished {', '.join(self._ends)}.")
        seconds: dict[str, float] = {}
        cpu: dict[str, float] = {}
        last = self._ends["start"]
        for stage in ("text", "denoise", "decode"):
            now = self._ends[stage]
            seconds[stage], cpu[stage] = now[0] - last[0], now[1] - last[1]
            last = now
        share = nfe / passes
        seconds["denoise"], cpu["denoise"] = seconds["denoise"] * share, cpu["denoise"] * share
        return {**{stage: seconds[stage] for stage in work.stages}, "cpu": cpu[work.main_stage]}

    def _listen(self, level: int, text: bytes, data: Any) -> None:
        line = text.decode("utf-8", "replace")
        for words, stage in _ENDS.items():
            if words in line:
                self._ends[stage] = perf_counter(), process_time()
