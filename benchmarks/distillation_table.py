"""TMD and DMD2-v on the built-in model, same computing time per row, several seeds: the table of docs/distill.md.

    python -m benchmarks.distillation_table --inputs runs/tiny --run runs/table    # half an hour a seed
    python -m benchmarks.distillation_table --run runs/table --plots docs          # tables and plots again

`--inputs`: the folder of a run of `tmd-distill tiny`, with data, teacher, VAE and text encoder. Every row is trained by
the stages of `tmd-distill` with the settings in ROWS, for about the same CPU time; what is finished is kept, so that
an interrupted run goes on where it was. Needs matplotlib for the plots.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tmd_ref.distill import evaluate as table
from tmd_ref.distill import recipe
from tmd_ref.distill.config import Config, load_config
from tmd_ref.distill.data import encode_prompts
from tmd_ref.distill.weights import load_teacher, load_text_encoder, load_vae
from tmd_ref.student import load_student

BATCH, CAPTIONS = 16, 128
COMMON = [f"stage1.batch={BATCH}", f"stage2.batch={BATCH}", "machine.log_every=10", "machine.save_every=50",
          "stage1.guidance=2.5", "stage2.normaliser=x0", "stage2.gan_weight=0.03"]  # fmt: skip
BASELINE = ["student.head_blocks=0"]
STEPS = ["stage1.steps=150", "stage2.steps=200"]
WARM_UP = ["stage1.objective=kd", "stage1.steps=100", "stage1.pairs={count: 96, shift: 3, guidance: 3}"]
COLUMNS = ("shape", "color", "background", "motion", "all", "frechet", "diversity")


@dataclass(frozen=True)
class Row:
    """One line: the stages to run, and what differs from the config `tiny`. `of`: whose stage 1 it goes on from."""

    name: str
    stages: tuple[str, ...]
    settings: tuple[str, ...]
    of: str | None = None


ROWS = {
    "dmd2-1": Row("DMD2-v, M = 1, after a warm-up", ("stage1", "stage2"),
                  (*BASELINE, "student.outer_steps=1", *WARM_UP, "stage2.steps=230")),
    "tmd-1": Row("TMD, M = 1, N = 2", ("stage1", "stage2"), ("student.outer_steps=1", *STEPS)),
    "dmd2-2": Row("DMD2-v, M = 2", ("stage2",), (*BASELINE, "stage2.steps=300")),
    "tmd-2": Row("TMD, M = 2, N = 2", ("stage1", "stage2"), (*STEPS,)),
    "no-rollout": Row("TMD, M = 2, N = 2, no rollout in stage 2", ("stage2",),
                      (*STEPS, "stage2.rollout=false"), of="tmd-2"),
    "stage-1": Row("TMD, M = 2, N = 2, stage 1 only", ("stage1",), ("stage1.steps=450",)),
    "dmd2-4": Row("DMD2-v, M = 4", ("stage2",), (*BASELINE, "student.outer_steps=4", "stage2.steps=300")),
    "normaliser": Row("TMD, M = 2, N = 2, normaliser `score`", ("stage2",),
                      (*STEPS, "stage2.normaliser=score"), of="tmd-2"),
    "less-guidance": Row("TMD, M = 2, N = 2, `score`, CFG 1.5 in stage 1", ("stage1", "stage2"),
                         (*STEPS, "stage1.guidance=1.5", "stage2.normaliser=score")),
}  # fmt: skip


def configured(row: Row, seed: int) -> Config:
    seeds = [f"{stage}.seed={1000 * seed + number}" for number, stage in enumerate(("stage1", "stage2"), 1)]
    return load_config("tiny", [*COMMON, *seeds, *row.settings])


def train(key: str, run: Path, inputs: Path, seed: int) -> None:
    """The stages of a row -> its folder; the CPU seconds of each stage -> seconds.json."""
    row, folder = ROWS[key], run / str(seed) / key
    config = configured(row, seed)
    if row.of:
        folder.mkdir(parents=True, exist_ok=True)
        source, target = run / str(seed) / row.of / "student_stage1.safetensors", folder / "student_stage1.safetensors"
        if not target.exists():
            target.symlink_to(source.resolve())
    took = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(took.read_text()) if took.exists() else {}
    for stage in row.stages:
        if stage not in seconds:
            click.echo(f"seed {seed}: {row.name}: {stage}")
            began = time.process_time()
            getattr(recipe, stage)(recipe.Job(config, folder, inputs, report=lambda line: None))
            seconds[stage] = time.process_time() - began
            took.write_text(json.dumps(seconds))


def measure(run: Path, inputs: Path, seed: int, teacher: bool) -> None:
    """All rows of a seed on the same captions -> evaluation.json and evaluation.png of the seed."""
    out = run / str(seed)
    if (out / "evaluation.json").exists():
        return
    config = configured(ROWS["tmd-2"], seed)
    job = recipe.Job(config, out, inputs)
    encoder, tokenizer, vae = (
        load_text_encoder(job.find("umt5.safetensors")),
        job.tokenizer(),
        load_vae(job.find("vae.safetensors")),
    )
    shape, settings = (config.wan.in_channels, *config.data.latent_size), config.evaluate
    rows = []
    if teacher:
        negative = encode_prompts(encoder, tokenizer, [""])
        rows.append(
            table.teacher_row("teacher", job.load_teacher(), negative, 50, settings.shift, settings.guidance, shape)
        )
    for key in ROWS:
        student = configured(ROWS[key], seed).student
        last = "student_stage1" if key == "stage-1" else "student" if student.is_tmd else "generator"
        path = out / key / f"{last}.safetensors"
        if student.is_tmd:
            made = load_student(path).float().eval()
            rows.append(table.student_row(key, made, student.outer_steps, student.inner_steps, shape))
        else:
            network = load_teacher(path, config.wan)
            rows.append(table.baseline_row(key, network, student.outer_steps, student.outer_shift, shape))
    table.measure(rows, vae, encoder, tokenizer, out, count=CAPTIONS, seed=settings.seed, frames=config.data.frames,
                  size=config.data.size)  # fmt: skip


def collect(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Measured rows, one entry per seed that is finished."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(run.glob("*/evaluation.json")):
        for key, values in json.loads(path.read_text())["rows"].items():
            took = path.parent / key / "seconds.json"
            seconds = sum(json.loads(took.read_text()).values()) if took.exists() else 0.0
            if key in ROWS and ROWS[key].of:
                first = path.parent / str(ROWS[key].of) / "seconds.json"
                seconds += json.loads(first.read_text())["stage1"]
            found.setdefault(key, []).append({**values, "seconds": seconds})
    return found


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    click.echo("| | seeds | CPU minutes | NFE | " + " | ".join(COLUMNS) + " |")
    click.echo("|---" * (4 + len(COLUMNS)) + "|")
    names = {"autoencoder": "rendered clips through the VAE", "teacher": "teacher, 50 x 2"}
    for key in ("autoencoder", "teacher", *ROWS):
        if key not in found:
            continue
        seeds, cells = found[key], []
        for column in COLUMNS:
            values = np.array([row[column] for row in seeds if column in row])
            percent = column not in ("frechet", "diversity")
            if not len(values):
                cells.append("")
                continue
            mean, spread = (100 * values.mean(), 100 * values.std()) if percent else (values.mean(), values.std())
            digits = 1 if percent else 2
            cells.append(
                f"{mean:.{digits}f}"
                + (f" ± {spread:.{digits}f}" if len(values) > 1 and spread else "")
                + (" %" if percent else "")
            )
        minutes = np.mean([row["seconds"] for row in seeds]) / 60
        name = ROWS[key].name if key in ROWS else names[key]
        click.echo(
            f"| {name} | {len(seeds)} | {f'{minutes:.1f}' if minutes else ''} | {seeds[0]['nfe']:g} | "
            + " | ".join(cells)
            + " |"
        )


def plot(run: Path, found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """distillation.png: attributes and Fréchet distance over NFE, and how training went."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(17, 4), layout="constrained")
    groups = {
        "DMD2-v": ("dmd2-1", "dmd2-2", "dmd2-4"),
        "TMD": ("tmd-1", "tmd-2"),
        "TMD, no rollout": ("no-rollout",),
        "TMD, stage 1 only": ("stage-1",),
    }
    for axis, column, title in ((axes[0], "shape", "shapes right, %"), (axes[1], "frechet", "Fréchet distance")):
        factor = 100 if column == "shape" else 1
        for (name, keys), marker in zip(groups.items(), "os^D", strict=True):
            keys = tuple(key for key in keys if key in found)
            values = [[factor * row[column] for row in found[key]] for key in keys]
            axis.errorbar([found[key][0]["nfe"] for key in keys], [np.mean(v) for v in values],
                          [np.std(v) for v in values], marker=marker, capsize=3, label=name)  # fmt: skip
        for name, style in (("teacher", "--"), ("autoencoder", ":")):
            if name in found:
                axis.axhline(factor * found[name][0][column], ls=style, c="gray", lw=1, label=name)
        axis.set(xlabel="NFE", title=title, xlim=(0.5, 4.5))
    axes[0].legend(fontsize=8)
    for axis, scalar in ((axes[2], "score_gap"), (axes[3], "clip_square")):
        for key, colour in zip(
            ("dmd2-1", "dmd2-2", "dmd2-4", "tmd-1", "tmd-2", "no-rollout"),
            ("C0", "C4", "C9", "C8", "C1", "C2"),
            strict=True,
        ):
            for number, path in enumerate(sorted(run.glob(f"*/{key}/stage2/metrics.jsonl"))):
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                points = [(line["step"], line[scalar]) for line in lines if scalar in line]
                axis.plot(
                    *zip(*points, strict=True),
                    c=colour,
                    lw=1,
                    label=None if number else ROWS[key].name.split(", after")[0],
                )
        axis.set(
            xlabel="step of stage 2",
            title={"score_gap": "fake score against teacher", "clip_square": "mean square of latents"}[scalar],
        )
    axes[3].legend(fontsize=7)
    figure.savefig(folder / "distillation.png", dpi=90)


@click.command(help=__doc__)
@click.option("--inputs", type=click.Path(path_type=Path, exists=True), help="Train and measure with what is there.")
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--plots", type=click.Path(path_type=Path, exists=True), help="Folder for distillation.png.")
def main(inputs: Path | None, run: Path, seeds: int, threads: int, plots: Path | None) -> None:
    torch.set_num_threads(threads)
    if inputs:
        for seed in range(1, seeds + 1):
            for key in ROWS:
                train(key, run, inputs, seed)
            measure(run, inputs, seed, teacher=seed == 1)
    found = collect(run)
    report(found)
    if plots:
        plot(run, found, plots)


if __name__ == "__main__":
    main()
