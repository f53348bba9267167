"""How well `--deadline` is kept while other programs come and go on the same core. Not a test: machines differ.

    taskset -c 1 python benchmarks/deadline.py --bundle builtin:tim-tiny       # or any bundle of a Transition Model

Two processes that do nothing but compute are stopped and set going again at random, every 0.1 to 1 s. Each line is one
deadline: how many steps the runs took, how late their denoising ended (negative: early), how long their longest step
was, and how many ended later than by one such step.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import click
import numpy as np

import tmd_runtime
from tmd_runtime import Pipeline, StepInfo

BURN = "while True: pass"
RIVALS = 2


@contextmanager
def changing_load(seed: int) -> Iterator[None]:
    """Rivals for this core that come and go, from 0 to all of them."""
    rivals = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(RIVALS)]
    over, rng = threading.Event(), random.Random(seed)

    def change() -> None:
        while not over.wait(rng.uniform(0.1, 1.0)):
            for rival in rivals:
                rival.send_signal(rng.choice((signal.SIGSTOP, signal.SIGCONT)))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for rival in rivals:
            rival.kill()
            rival.wait()


def run(
    pipeline: Pipeline, embeds: np.ndarray, seconds: float, size: tuple[int, int], seed: int
) -> tuple[int, float, float]:
    """Steps, seconds beyond the deadline, and seconds of the longest step."""
    longest = 0.0
    steps = 0

    def heard(info: StepInfo) -> None:
        nonlocal longest, steps
        if info.stage == "flow_head":
            longest, steps = max(longest, info.seconds), info.done

    start = perf_counter()
    pipeline.denoise(embeds, seed, size=size, callback=heard, guidance=1, deadline=seconds)
    return steps, perf_counter() - start - seconds, longest


def row(values: list[float], unit: float = 1.0) -> str:
    low, middle, high = np.percentile(np.array(values) * unit, [0, 50, 100])
    return f"{middle:7.1f} ({low:.1f}..{high:.1f})"


@click.command(help=__doc__)
@click.option("--bundle", type=click.Path(path_type=Path), required=True)
@click.option("--size", type=(int, int), default=(128, 128), show_default=True, help="Width and height in pixels.")
@click.option("--deadlines", default="0.05,0.1,0.25,0.5,1", show_default=True, help="Seconds.")
@click.option("--repetitions", default=20, show_default=True)
@click.option("--idle", is_flag=True, help="Without the other processes.")
def main(bundle: Path, size: tuple[int, int], deadlines: str, repetitions: int, idle: bool) -> None:
    with tmd_runtime.load(bundle, threads=1) as pipeline:
        text = pipeline.manifest.text
        embeds = np.random.default_rng(0).standard_normal((1, text.max_length, text.dim)).astype(np.float32)
        pipeline.denoise(embeds, 0, size=size, guidance=1, steps=8)
        print(
            f"{len(os.sched_getaffinity(0))} core(s), {size[0]}x{size[1]}, {repetitions} runs of each; median (range)"
        )
        print(" deadline    steps              late by, ms             longest step, ms        late by more than it")
        for seconds in map(float, deadlines.split(",")):
            if idle:
                runs = [run(pipeline, embeds, seconds, size, seed) for seed in range(repetitions)]
            else:
                with changing_load(round(seconds * 1000)):
                    runs = [run(pipeline, embeds, seconds, size, seed) for seed in range(repetitions)]
            steps, late, longest = ([float(each[k]) for each in runs] for k in range(3))
            beyond = sum(a > b for a, b in zip(late, longest, strict=True))
            print(f"{seconds:7.2f} s {row(steps):>20} {row(late, 1e3):>26} {row(longest, 1e3):>22} {beyond:8d}")


if __name__ == "__main__":
    main()
