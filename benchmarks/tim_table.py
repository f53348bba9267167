"""Transition Models, flow matching and MeanFlow on stills, equal network and training: the table of docs/tim-log.md.

    python -m benchmarks.tim_table --inputs runs/tim --run runs/tim-table     # about 50 minutes a seed, one core
    python -m benchmarks.tim_table --run runs/tim-table --plots docs          # tables and plots again

`--inputs`: the folder of a run of `tmd-distill ... --config tim-tiny`, with data, VAE, text encoder and tokenizer. What
is finished is kept, so that an interrupted run goes on where it was. Needs matplotlib for the plots.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tmd_ref.distill import tim_recipe
from tmd_ref.distill.tim_config import load_any

STEPS, FIRST_SEED = 4000, 12
ROWS = {  # folder -> title, config and what differs from it
    "tim-tiny": ("Transition Model", "tim-tiny", ()),
    "tim-tiny-meanflow": ("MeanFlow", "tim-tiny-meanflow", ()),
    "tim-tiny-flow-weighted": ("flow matching with MeanFlow's weight", "tim-tiny-flow", ("tim.adaptive=1e-3",)),
    "tim-tiny-flow": ("flow matching", "tim-tiny-flow", ()),
}
Values = dict[int, list[dict[str, float]]]  # number of steps (0: the VAE alone) -> what each seed reached


def train(row: str, seed: int, run: Path, inputs: Path) -> None:
    """The network of a row and its measurement -> RUN/ROW-SEED."""
    folder = run / f"{row}-{seed}"
    if (folder / "evaluation.json").exists():
        return
    click.echo(f"{folder}")
    _, config, settings = ROWS[row]
    chosen = load_any(config, [f"tim.seed={seed}", f"tim.steps={STEPS}", *settings])
    job = tim_recipe.TiMJob(chosen, folder, inputs)  # type: ignore[arg-type]
    if not (folder / tim_recipe.WEIGHTS).exists():
        tim_recipe.tim(job)
    tim_recipe.evaluate(job)


def collect(run: Path) -> dict[str, Values]:
    found: dict[str, Values] = {}
    for row in ROWS:
        for path in sorted(run.glob(f"{row}-[0-9]*/evaluation.json")):
            for name, values in json.loads(path.read_text())["rows"].items():
                number = re.match(r"(\d+) steps", name)
                steps = int(number[1]) if number else 0
                found.setdefault(row, {}).setdefault(steps, []).append(values)
    return found


def report(found: dict[str, Values]) -> None:
    for column, unit in (("all", " %"), ("frechet", "")):
        factor, digits = (100, 1) if unit else (1, 3)
        steps = sorted(next(iter(found.values())))[1:]
        click.echo(f"\n| {column} | seeds | " + " | ".join(map(str, steps)) + " |\n" + "|---" * (2 + len(steps)) + "|")
        for row, values in found.items():
            cells = [np.array([seed[column] for seed in values[number]]) * factor for number in steps]
            shown = [f"{cell.mean():.{digits}f} ± {cell.std():.{digits}f}{unit}" for cell in cells]
            click.echo(f"| {ROWS[row][0]} | {len(cells[0])} | " + " | ".join(shown) + " |")
        (ceiling,) = {round(seed[column] * factor, digits) for values in found.values() for seed in values[0]}
        click.echo(f"VAE alone: {ceiling}{unit}")


def plot(found: dict[str, Values], folder: Path) -> None:
    """tim.png: stills as described and Fréchet distance over the number of steps; bars from worst to best seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, column, title in ((axes[0], "all", "stills as described, %"), (axes[1], "frechet", "Fréchet distance")):
        factor = 100 if column == "all" else 1
        for (row, values), marker in zip(found.items(), "os^v", strict=False):
            steps = sorted(values)[1:]
            seeds: Any = np.array([[factor * seed[column] for seed in values[number]] for number in steps])
            mean = seeds.mean(1)
            axis.errorbar(
                steps, mean, [mean - seeds.min(1), seeds.max(1) - mean], marker=marker, capsize=3, label=ROWS[row][0]
            )
        axis.axhline(factor * next(iter(found.values()))[0][0][column], ls=":", c="gray", label="VAE alone")
        axis.set_xscale("log", base=2)
        axis.set(xlabel="steps (one evaluation each)", title=title, xticks=steps, xticklabels=steps)
    axes[1].legend()
    figure.savefig(folder / "tim.png", dpi=90)


@click.command(help=__doc__)
@click.option("--inputs", type=click.Path(path_type=Path, exists=True), help="Train and measure with what is there.")
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--plots", type=click.Path(path_type=Path, exists=True), help="Folder for tim.png.")
def main(inputs: Path | None, run: Path, seeds: int, threads: int, plots: Path | None) -> None:
    torch.set_num_threads(threads)
    for seed in range(FIRST_SEED, FIRST_SEED + seeds) if inputs else ():
        for row in ROWS:
            train(row, seed, run, inputs)  # type: ignore[arg-type]
    found = collect(run)
    report(found)
    if plots:
        plot(found, plots)


if __name__ == "__main__":
    main()
