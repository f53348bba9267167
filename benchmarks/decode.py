"""The decoding of a video alone: Wan's VAE and TAEHV in several precisions, and diffusers' AutoencoderKLWan. Linux.

    python -m benchmarks.decode --work /big/disk --size 256x256 --frames 17 --threads 1
    python -m benchmarks.decode --work /big/disk --contender int8:openvino --contender diffusers:eager

Weights are random: only time and memory mean something. Each contender is a process of its own, one after the other,
and decodes the same latents once to get ready (`cold`) and then once per round. Bundles are made in `--work` and kept
for the next call. Printed is a Markdown table: seconds of the clock and of the processor, operations per second of
processor time, processor time relative to the first contender, and the peaks of resident and of anonymous memory.

Operations are those of Wan's network at this size, counted from the graphs, also for diffusers, which computes the
same; a first frame whose convolutions see zeros costs less than is counted.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

import click
import numpy as np

from tmd_engines.command.options import Size

ROOT = Path(__file__).parents[1]
CONTENDERS = (
    "int8:openvino", "bf16:openvino", "fp16:openvino", "fp16:onnxruntime", "taehv-bf16:openvino",
    "diffusers:eager", "diffusers:compiled",
)  # fmt: skip
PARTS = "decoder_first,decoder_step"


def bundle(work: Path, name: str) -> Path:
    """The bundle of the contender `name` ("int8", "taehv-bf16"), made if it is not there."""
    out = work / f"decoder-{name}"
    if out.exists():
        return out
    decoder, _, precision = name.rpartition("-")
    arguments = ["--model", "wan1.3b", "--random-weights", "0", "--parts", PARTS, "--no-verify", "--keep-no-layers"]
    if decoder:
        arguments += ["--decoder", str(_taehv(work))]
    arguments += ["--precision", f"bf16,decoder={precision}", "--quiet", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "tmd_export", *arguments], check=True, cwd=ROOT)
    return out


def _taehv(work: Path) -> Path:
    """A file of TAEHV's layout with random weights."""
    import torch
    from safetensors.torch import save_file

    from tmd_ref.taehv import TAEHV

    path = work / "taehv-random.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(TAEHV().state_dict(), path)
    return path


def ours(folder: Path, engine: str, latents: np.ndarray, threads: int) -> tuple[Callable[[], np.ndarray], int]:
    """Decodes `latents` by the bundle `folder`; and the operations of that."""
    from tmd_engines import Bundle, load
    from tmd_engines.bundle.graph_file import parse_graph
    from tmd_engines.cost.operations import flops
    from tmd_engines.cost.shapes import infer_shapes
    from tmd_runtime.autoencoder.decoder import ChunkDecoder
    from tmd_runtime.clock import Timings

    opened = Bundle.open(folder)
    sizes = {"batch": 1, "frames": 1, "height": latents.shape[3], "width": latents.shape[4]}
    operations = []
    for each in PARTS.split(","):
        model, info = parse_graph(opened.read_graph(each), each), opened.graph_info(each)
        shapes = {spec.name: spec.resolve(**sizes) for spec in info.inputs}
        operations.append(flops(infer_shapes(model, shapes, each), each))
    graphs = [load(opened, each, engine, "cpu", threads) for each in PARTS.split(",")]
    decoder = ChunkDecoder(graphs[0], *latents.shape[3:])
    return (
        lambda: np.concatenate(list(decoder.chunks(latents, lambda: graphs[1], Timings()))),
        operations[0] + (latents.shape[2] - 1) * operations[1],
    )


def diffusers(how: str, latents: np.ndarray) -> Callable[[], np.ndarray]:
    """AutoencoderKLWan in bfloat16, as it is or with its decoder compiled and weights frozen."""
    import torch
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan().to(torch.bfloat16).eval()
    del vae.encoder
    if how == "compiled":
        import torch._inductor.config

        torch._inductor.config.freezing = True
        vae.decoder = torch.compile(vae.decoder)
    given = torch.from_numpy(latents).to(torch.bfloat16)

    @torch.no_grad()
    def run() -> np.ndarray:
        video = vae.decode(given).sample
        frames: np.ndarray = ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        return frames

    return run


def contender(setting: dict[str, Any]) -> dict[str, Any]:
    """Runs in a process of its own."""
    width, height = setting["size"]
    frames = 1 + (setting["frames"] - 1) // 4
    latents = np.random.default_rng(0).standard_normal((1, 16, frames, height // 8, width // 8), np.float32)
    peak = [0]
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    name, _, how = setting["contender"].partition(":")
    began, operations = perf_counter(), 0
    if name == "diffusers":
        import torch

        torch.set_num_threads(setting["threads"])
        run = diffusers(how, latents)
    else:
        run, operations = ours(Path(setting["folder"]), how, latents, setting["threads"])
    run()
    cold = perf_counter() - began
    rounds = []
    for _ in range(setting["rounds"]):
        start, cpu = perf_counter(), process_time()
        run()
        rounds.append((perf_counter() - start, process_time() - cpu))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cold": cold, "rounds": rounds, "operations": operations, "resident": resident, "anonymous": peak[0]}


def _watch(peak: list[int]) -> None:
    """Keeps the largest anonymous memory of this process, in bytes."""
    while True:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        peak[0] = max(peak[0], int(text.partition("RssAnon:")[2].split()[0]) * 1024)
        sleep(0.05)


def row(name: str, found: dict[str, Any], operations: int, base: float) -> str:
    """One line of the table. `operations`: of the network, 0 if unknown. `base`: processor seconds of the first."""
    clock, cpu = (median(column) for column in zip(*found["rounds"], strict=True))
    rate = f"{operations / cpu / 1e9:.0f}" if operations else ""
    memory = " | ".join(f"{found[key] / 1e9:.2f} GB" for key in ("resident", "anonymous"))
    return f"| {name} | {clock:.1f} s | {cpu:.1f} s | {rate} | {cpu / base:.2f} | {found['cold']:.1f} s | {memory} |"


@click.command()
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="A folder for bundles; 1 GB.")
@click.option("--contender", "contenders", type=click.Choice(CONTENDERS), multiple=True, help="[default: all]")
@click.option("--size", type=Size(), default="256x256", show_default=True)
@click.option("--frames", type=int, default=17, show_default=True)
@click.option("--threads", type=int, default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--one", hidden=True)
def main(
    work: Path | None,
    contenders: tuple[str, ...],
    size: tuple[int, int],
    frames: int,
    threads: int,
    rounds: int,
    one: str | None,
) -> None:
    if one is not None:
        print(json.dumps(contender(json.loads(one))))
        return
    if work is None:
        raise click.UsageError("--work is missing: name a folder where bundles may lie.")
    work.mkdir(parents=True, exist_ok=True)
    names, operations, base = contenders or CONTENDERS, 0, 0.0
    folders = {name: bundle(work, name.partition(":")[0]) for name in names if not name.startswith("diffusers")}
    versions = ", ".join(f"{each} {version(each)}" for each in ("openvino", "onnxruntime", "torch", "diffusers"))
    print(f"{size[0]}x{size[1]}x{frames}, threads: {threads}, rounds: {rounds}; {versions}\n")
    print("| | clock | processor | GFLOP/s | processor time / first | cold | peak memory | anonymous |")
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        setting = {"contender": name, "size": size, "frames": frames, "threads": threads, "rounds": rounds}
        setting["folder"] = str(folders.get(name, ""))
        command = [sys.executable, "-m", "benchmarks.decode", "--one", json.dumps(setting)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} |", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        base = base or median(cpu for _, cpu in found["rounds"])
        if not name.startswith(("taehv", "diffusers")):
            operations = found["operations"]
        own = found["operations"] if name.startswith("taehv") else operations
        print(row(name, found, own, base), flush=True)


if __name__ == "__main__":
    main()
