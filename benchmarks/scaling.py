"""Time and memory of the denoising loop against frames, size, outer and inner steps, beside what `inspect` foretells.

    python -m benchmarks.scaling --bundle my-bundle --threads 2 --out docs/scaling.png

One process of `tmd-bench` per point. Operations are the estimate's; one rate for all points (their median) makes
seconds of them. Needs matplotlib.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click

BASE = {"size": "256x256", "frames": 17, "steps": 1, "inner-steps": 2}
AXES: dict[str, tuple[Any, ...]] = {
    "frames": (5, 17, 33),
    "size": ("128x128", "256x256", "384x256"),
    "steps": (1, 2),
    "inner-steps": (1, 2, 4),
}
TITLES = {"frames": "frames", "size": "pixels of a frame", "steps": "outer steps M", "inner-steps": "inner steps N"}


def measure(bundle: Path, engine: str, threads: int, point: dict[str, Any]) -> dict[str, float]:
    """Seconds (clock, processor), operations and peaks of memory of one setting."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        options = [word for name, value in point.items() for word in (f"--{name}", str(value))]
        how = ["--engine", engine, "--threads", str(threads), "--rounds", "1", "--json", file.name]
        command = [sys.executable, "-m", "tmd_bench", "--bundle", str(bundle), *options, *how]
        subprocess.run(command, check=True, stdout=sys.stderr)
        found = json.loads(Path(file.name).read_text())["contenders"][engine]
    seconds = found["seconds"]
    return {"seconds": seconds["denoise"]["median"], "cpu": seconds["cpu"]["median"],
            "flops": found["flops"]["denoise"], "resident": found["peak_bytes"],
            "anonymous": found["peak_anonymous_bytes"]}  # fmt: skip


def value_of(axis: str, value: Any) -> float:
    if axis != "size":
        return float(value)
    width, height = map(int, value.split("x"))
    return float(width * height)


def draw(results: list[tuple[str, Any, dict[str, float]]], rate: float, out: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, rows = pyplot.subplots(2, len(AXES), figsize=(13, 6), sharey="row", layout="constrained")
    for column, axis in enumerate(AXES):
        found = [(value_of(name, value), one) for name, value, one in results if name == axis]
        x = [value for value, _ in found]
        time, memory = rows[0][column], rows[1][column]
        time.plot(x, [one["seconds"] for _, one in found], "o", label="measured")
        time.plot(x, [one["flops"] / rate for _, one in found], "-", color="gray", label=f"{rate / 1e9:.0f} GFLOP/s")
        memory.plot(x, [one["resident"] / 1e9 for _, one in found], "o", label="resident")
        memory.plot(x, [one["anonymous"] / 1e9 for _, one in found], "x", label="without mapped files")
        memory.set_xlabel(TITLES[axis])
        for panel in (time, memory):
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
    rows[0][0].set_ylabel("seconds of the loop")
    rows[1][0].set_ylabel("peak of memory, GB")
    rows[0][0].legend()
    rows[1][0].legend()
    figure.savefig(out, dpi=100)


@click.command(help=__doc__)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--engine", default="openvino", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The picture; the figures go to FILE.json.")
def main(bundle: Path, engine: str, threads: int, out: Path) -> None:
    measured: dict[str, dict[str, float]] = {}
    results = []
    for axis, values in AXES.items():
        for value in values:
            point = BASE | {axis: value}
            key = json.dumps(point)
            if key not in measured:
                measured[key] = measure(bundle, engine, threads, point)
            results.append((axis, value, measured[key]))
    rate = median(one["flops"] / one["seconds"] for one in measured.values())
    out.with_suffix(".json").write_text(json.dumps({"rate": rate, "points": measured}, indent=1))
    click.echo("| | seconds | foretold | difference | resident | without mapped files |\n|---|---|---|---|---|---|")
    for axis, value, one in results:
        foretold, seconds = one["flops"] / rate, one["seconds"]
        memory = f"{one['resident'] / 1e9:.2f} GB | {one['anonymous'] / 1e9:.2f} GB"
        difference = 100 * (foretold / seconds - 1)
        click.echo(f"| {axis} {value} | {seconds:.2f} | {foretold:.2f} | {difference:+.0f} % | {memory} |")
    click.echo(f"\nrate: {rate / 1e9:.0f} GFLOP/s, {threads} threads, {engine}")
    draw(results, rate, out)


if __name__ == "__main__":
    main()
