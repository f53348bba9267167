"""Wan2.1 by a bundle and by diffusers' WanPipeline: the time and the peak memory of each stage, in the same run. Linux.

    python -m benchmarks.wan_pipeline --checkpoint Wan2.1-T2V-1.3B --threads 4      # an official folder
    python -m benchmarks.wan_pipeline --work /big/disk                              # the same size, random weights

Both sides get the same weights, prompt embeddings, first noise, size, UniPC steps and threads, no guidance, and end at
uint8 frames. Each run is a process of its own; the two sides take turns. Printed is a Markdown table of medians: wall
and CPU seconds, and the peaks of resident memory with mapped files and of anonymous memory (what no file backs). The
decoder is measured in fp32 alone: diffusers advises float32 for the VAE, and ONNX Runtime computes in it anyway.
Disk: 6.2 GB for random weights, and as much again for the bundle.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).parents[1]
SIDES = {"tmd": "tmd-run", "diffusers": "WanPipeline"}
WORDS, TEXT, SEED = 23, (1, 512, 4096), 3  # rows of the embeddings that are not zero; all of them
FLOW_SHIFT = 3.0
SAMPLING_SECONDS = 0.02


@dataclass(frozen=True)
class Setting:
    """One run: `model` is the bundle or the checkpoint folder, `latents` the file that gets the result."""

    side: str
    model: str
    latents: str
    precision: str
    engine: str
    width: int
    height: int
    frames: int
    steps: int
    threads: int

    def noise(self) -> np.ndarray:
        """The first noise, `[1, 16, T, h, w]`, that of the bundle's seed."""
        from tmd_runtime import NoiseStream

        return NoiseStream(SEED).normal((1, 16, (self.frames - 1) // 4 + 1, self.height // 8, self.width // 8))


def prompt_embeds() -> np.ndarray:
    rows = np.zeros(TEXT, np.float32)
    rows[:, :WORDS] = np.random.default_rng(2).standard_normal((1, WORDS, TEXT[2]), np.float32)
    return rows


class Meter:
    """What the stages of this process take, one after the other."""

    _stage: str
    _began: tuple[float, float]

    def __init__(self) -> None:
        self.stages: dict[str, dict[str, float]] = {}
        self._anonymous, self._over = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        self.begin("import")

    def begin(self, stage: str | None) -> None:
        """Ends the stage that is on, and begins the next."""
        now = perf_counter(), process_time()
        if self.stages:
            wall, cpu = now[0] - self._began[0], now[1] - self._began[1]
            peak, anonymous = _status("VmHWM"), max(self._anonymous, _status("RssAnon"))
            self.stages[self._stage] |= {"wall": wall, "cpu": cpu, "peak": peak, "anonymous": anonymous}
        if stage is not None:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            self._stage, self._anonymous = stage, 0
            self.stages[stage] = {}
            self._began = perf_counter(), process_time()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLING_SECONDS):
            self._anonymous = max(self._anonymous, _status("RssAnon"))


def _status(field: str) -> int:
    """Bytes, from Linux's table of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure_tmd(setting: Setting, meter: Meter) -> np.ndarray:
    import tmd_runtime

    meter.begin("check the bundle")
    pipeline = tmd_runtime.load(setting.model, engine=setting.engine, threads=setting.threads, memory="low")
    graphs = pipeline.manifest.graphs
    kept: list[np.ndarray] = []

    def step(info: tmd_runtime.StepInfo) -> None:
        if info.stage == "load" and info.done == 2 and "transformer" not in meter.stages:  # both of its graphs
            meter.begin("transformer")

    def on_latents(latents: np.ndarray) -> None:
        kept.append(latents)
        meter.begin("decoder" if "decoder_first" in graphs else None)

    size = (setting.width, setting.height)
    wishes: dict[str, Any] = {"seed": SEED, "steps": setting.steps, "frames": setting.frames, "size": size}
    meter.begin("load")
    with pipeline:
        result = pipeline(
            "",
            prompt_embeds=prompt_embeds(),
            guidance=1.0,
            shift=FLOW_SHIFT,
            callback=step,
            on_latents=on_latents,
            **wishes,
        )
    if len(result.frames):
        meter.begin(None)
    return kept[0]


def measure_diffusers(setting: Setting, meter: Meter) -> np.ndarray:
    import diffusers
    import torch

    torch.set_num_threads(setting.threads)
    diffusers.utils.logging.disable_progress_bar()
    whole = setting.precision == "fp32"
    meter.begin("load")
    transformer = _transformer(Path(setting.model), torch.float32 if whole else torch.bfloat16)
    vae = _vae(Path(setting.model)) if whole else diffusers.AutoencoderKLWan(base_dim=8)  # which stays idle
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
    )
    pipe.set_progress_bar_config(disable=True)
    kept: list[np.ndarray] = []

    def after_step(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == setting.steps - 1:
            kept.append(given["latents"].float().numpy())
            meter.begin("decoder" if whole else None)
        return {}

    noise, rows = torch.from_numpy(setting.noise()), torch.from_numpy(prompt_embeds())
    meter.begin("transformer")
    video = pipe(
        prompt_embeds=rows,
        guidance_scale=1.0,
        latents=noise,
        num_inference_steps=setting.steps,
        num_frames=setting.frames,
        width=setting.width,
        height=setting.height,
        output_type="np" if whole else "latent",
        callback_on_step_end=after_step,
    ).frames
    if whole:
        frames = (video[0] * 255).round().astype(np.uint8)
        meter.begin(None)
        if frames.shape != (setting.frames, setting.height, setting.width, 3):
            raise SystemExit(f"WanPipeline gave frames {frames.shape}.")
    return kept[0]


def _transformer(folder: Path, dtype: Any) -> Any:
    """WanTransformer3DModel with an official folder's weights, mapped in fp32, renamed by diffusers' own converter."""
    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from safetensors.torch import load_file

    files = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    state = convert_wan_transformer_to_diffusers({k: v for file in files for k, v in load_file(file).items()})
    dim, layers = state["patch_embedding.bias"].numel(), 1 + max(_blocks(state))
    sizes = {"num_attention_heads": dim // 128, "ffn_dim": state["blocks.0.ffn.net.2.weight"].shape[1]}
    with torch.device("meta"):
        model = WanTransformer3DModel(num_layers=layers, **sizes)
    model.rope = type(model.rope)(128, model.config.patch_size, model.config.rope_max_seq_len)  # tables are no weights
    if dtype != torch.float32:
        kept = WanTransformer3DModel._keep_in_fp32_modules
        for name in state:
            if not any(word in name.split(".") for word in kept):
                state[name] = state[name].to(dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _blocks(state: dict[str, Any]) -> Iterator[int]:
    return (int(name.split(".")[1]) for name in state if name.startswith("blocks."))


def _vae(folder: Path) -> Any:
    import torch
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    vae = AutoencoderKLWan()
    state = torch.load(folder / "Wan2.1_VAE.pth", map_location="cpu", weights_only=True, mmap=True)
    vae.load_state_dict(convert_wan_vae_to_diffusers(state), assign=True)
    return vae.eval()


def measured(setting: Setting) -> dict[str, dict[str, float]]:
    """The stages of one run, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(setting.threads)}
    command = [sys.executable, "-m", "benchmarks.wan_pipeline", "--run", json.dumps(asdict(setting))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"the run of {SIDES[setting.side]} failed: {done.stdout}")
    stages: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return stages


@contextmanager
def exported(checkpoint: Path, work: Path, precision: str) -> Iterator[Path]:
    """The bundle of a precision, for as long as it is measured."""
    bundle = work / f"bundle-{precision}"
    parts = "backbone,flow_head" + (",decoder_first,decoder_step" if precision == "fp32" else "")
    options = ["--precision", precision, "--parts", parts, "--no-verify", "--quiet", "--out", str(bundle)]
    given = ["--model", "wan1.3b", "--checkpoint", str(checkpoint), *options]
    subprocess.run([sys.executable, "-m", "tmd_export", *given], check=True)
    try:
        yield bundle
    finally:
        shutil.rmtree(bundle)


def report(found: dict[tuple[str, str], list[dict[str, dict[str, float]]]]) -> None:
    print("\n| precision | side | stage | wall | CPU | peak | anonymous |\n|---|---|---|---|---|---|---|")
    for (precision, side), runs in found.items():
        for stage in runs[0]:
            if stage == "import":
                continue
            wall, cpu, peak, anonymous = (
                median(run[stage][key] for run in runs) for key in ("wall", "cpu", "peak", "anonymous")
            )
            memory = f"{peak / 2**20:.0f} MiB | {anonymous / 2**20:.0f} MiB"
            print(f"| {precision} | {SIDES[side]} | {stage} | {wall:.1f} s | {cpu:.1f} s | {memory} |")


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "openvino", "torch", "diffusers"))
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}; Python {platform.python_version()}, {versions}"


@click.command(help=__doc__)
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Official folder of wan1.3b.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for large files.  [default: a temporary one]")
@click.option("--size", default="256x256", show_default=True)
@click.option("--frames", default=17, show_default=True)
@click.option("--steps", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--precision", default="fp32,bf16", show_default=True)
@click.option("--engine", default="onnxruntime", show_default=True)
@click.option("--repetitions", default=1, show_default=True)
@click.option("--run", "one", hidden=True)
def main(
    checkpoint: Path | None,
    work: Path | None,
    size: str,
    frames: int,
    steps: int,
    threads: int,
    precision: str,
    engine: str,
    repetitions: int,
    one: str | None,
) -> None:
    if one is not None:
        setting = Setting(**json.loads(one))
        meter = Meter()
        latents = (measure_tmd if setting.side == "tmd" else measure_diffusers)(setting, meter)
        np.save(setting.latents, latents)
        print(json.dumps(meter.stages))
        return
    width, height = map(int, size.split("x"))
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        if checkpoint is None:
            from tests.helpers.synthetic_checkpoints import write_full_size

            checkpoint = write_full_size(folder / "Wan2.1-T2V-1.3B")
        print(machine())
        print(f"{width}x{height}, {frames} frames, {steps} steps, {threads} threads, {repetitions} runs in turns")
        found: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {}
        for kind in precision.split(","):
            with exported(checkpoint, folder, kind) as bundle:
                setting = Setting("tmd", str(bundle), "", kind, engine, width, height, frames, steps, threads)
                for _ in range(repetitions):
                    for side, model in (("tmd", bundle), ("diffusers", checkpoint)):
                        file = str(folder / f"{side}.npy")
                        stages = measured(replace(setting, side=side, model=str(model), latents=file))
                        found.setdefault((kind, side), []).append(stages)
                        print(f"{kind} {SIDES[side]}: {json.dumps(stages)}", file=sys.stderr, flush=True)
            ours, theirs = (np.load(folder / f"{side}.npy").astype(np.float64) for side in SIDES)
            cosine = (ours * theirs).sum() / np.sqrt((ours**2).sum() * (theirs**2).sum())
            error = np.abs(ours - theirs).max()
            print(f"{kind}: latents differ by {error:.1e} at most (deviation {theirs.std():.3f}), cosine {cosine:.7f}")
        report(found)


if __name__ == "__main__":
    main()
