"""Memory of the denoising loop over time: of this project's engines, and of what else runs the same weights. Linux.

    python -m benchmarks.memory --precision bf16,fp32 --engines openvino,onnxruntime,torch-compile,diffusers
    python -m benchmarks.memory --blocks 6 --precision int8 --engines openvino --timeline

Wan2.1-1.3B with random weights, as a TMD student, is exported in each precision. Then every contender loads it and
denoises twice, each in a process of its own that is watched from outside: resident memory, and what of it is anonymous
(no file backs it) or pages of mapped files, every 20 ms. The table has the peaks by phase. For an engine the last
column is what `tmd-engine inspect` says. A bundle that is there already is measured with --bundle, by engines alone.
Disk: 3 GB for bf16, 6 GB for fp32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import click

from benchmarks.wan_pipeline import machine
from tmd_bench.contest import THREAD_VARIABLES
from tmd_bench.spec import Work

PERIOD = 0.02  # seconds
STEPS = INNER_STEPS = 1
MIB = 1 << 20


class Sample(NamedTuple):
    seconds: float
    resident: int
    anonymous: int
    file: int


class Watched:
    """A contender of tmd-bench in a process of its own, and what that holds over time, in bytes."""

    def __init__(self, name: str, work: Work) -> None:
        environment = os.environ | {variable: str(work.threads) for variable in THREAD_VARIABLES}
        command = [sys.executable, "-m", "tmd_bench.worker", name, work.to_json()]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.samples: list[Sample] = []
        self._began, self._over = perf_counter(), threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            try:
                lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
            except OSError:
                return
            found = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith(" kB")}
            if "VmRSS" in found:
                now = perf_counter() - self._began
                self.samples.append(Sample(now, found["VmRSS"], found["RssAnon"], found["RssFile"]))

    def ask(self, what: str) -> list[Sample]:
        """The samples while the contender does it."""
        before = len(self.samples)
        assert self._process.stdin and self._process.stdout  # both are pipes
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline() or '{"error": "its process ended"}')
        if "error" in answer:
            raise SystemExit(f"{what}: {answer['error']}")
        return self.samples[before:]

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._over.set()
        self._watcher.join()


def estimated(work: Work, engine: str) -> int:
    """What the estimate says of the loop, in bytes."""
    from tmd_engines import Bundle
    from tmd_engines.cost.sizing import estimate

    return estimate(
        Bundle.open(work.bundle), width=work.width, height=work.height, frames=work.frames, engine=engine
    ).peak("low")


def exported(work: Work, folder: Path) -> Work:
    """With the bundle of the shortened student, which tmd-bench's rivals make from the same seed."""
    from tmd_export.export import export_bundle
    from tmd_export.sources.random_wan import RandomSource
    from tmd_export.sources.wan21 import HEAD_BLOCKS
    from tmd_ref.wan import WAN_CONFIGS

    whole = WAN_CONFIGS["wan1.3b"]
    head = max(1, round(work.blocks * HEAD_BLOCKS["wan1.3b"] / whole.num_layers)) if work.blocks else None
    wan = replace(whole, num_layers=work.blocks or whole.num_layers)
    source = RandomSource("wan1.3b", work.random_seed or 0, wan=wan, head_blocks=head)
    out = folder / f"bundle-{work.precision}"
    parts = ("backbone", "flow_head")
    export_bundle(source, out, parts, precision=work.precision, verify=False, keep_layers=False)
    return replace(work, bundle=str(out))


def measure(name: str, work: Work, is_ours: bool, timeline: bool) -> None:
    watched = Watched(name, work)
    try:
        for phase, what in (("load", "load"), ("first run", "run"), ("second run", "run")):
            samples = watched.ask(what)
            if not samples:
                continue
            top = max(samples, key=lambda sample: sample.resident)
            last = samples[-1]
            estimate = f"{estimated(work, name) / MIB:.0f}" if is_ours and what == "run" else ""
            figures = (top.resident, max(s.anonymous for s in samples), max(s.file for s in samples), last.resident)
            cells = " | ".join(f"{figure / MIB:.0f}" for figure in figures)
            print(f"| {work.precision} | {name} | {phase} | {cells} | {estimate} |", flush=True)
    finally:
        watched.close()
    if timeline:
        second = -1
        for sample in watched.samples:
            if int(sample.seconds) > second:
                second = int(sample.seconds)
                print(f"    {second} s: {' '.join(f'{part / MIB:.0f}' for part in sample[1:])}")


@click.command(help=__doc__)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), help="Measure this one; exports nothing.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for bundles.  [default: a temporary one]")
@click.option("--precision", default="bf16", show_default=True)
@click.option("--engines", default="openvino,torch-compile", show_default=True)
@click.option("--blocks", default=30, show_default=True, help="Transformer blocks of the model.")
@click.option("--size", default="256x256", show_default=True)
@click.option("--frames", default=17, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--timeline", is_flag=True, help="Print resident, anonymous and file memory once a second too.")
def main(
    bundle: Path | None,
    work: Path | None,
    precision: str,
    engines: str,
    blocks: int,
    size: str,
    frames: int,
    threads: int,
    timeline: bool,
) -> None:
    from tmd_engines.registry import ENGINES

    width, height = map(int, size.split("x"))
    print(machine())
    print(f"{blocks} blocks, {width}x{height}, {frames} frames, {threads} threads; MiB")
    print(
        "\n| precision | | phase | peak resident | peak anonymous | peak of files | resident at its end | estimated |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in precision.split(","):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            origin: dict[str, Any] = {"model": "wan1.3b", "random_seed": 0, "blocks": blocks}
            job = Work("", kind, width, height, frames, STEPS, INNER_STEPS, threads, **origin)
            job = replace(job, bundle=str(bundle)) if bundle else exported(job, Path(folder))
            for name in engines.split(","):
                measure(name, job, name in ENGINES, timeline)


if __name__ == "__main__":
    main()
