"""TMD and DMD2-v on the built-in model at equal cost, several seeds: the tables and the plot of docs/distill.md.

    python -m benchmarks.distillation_table --inputs runs/tiny --run runs/table                 # all rows, seed 1
    python -m benchmarks.distillation_table --inputs runs/tiny --run runs/table --budget 8 --seed 2 --row tmd-2
    python -m benchmarks.distillation_table --run runs/table --docs docs                        # tables, plot again

`--inputs`: the folder of a run of `tmd-distill tiny`, with data, teacher, VAE and text encoder. A row is trained by the
stages of `tmd-distill` for as many steps as its budget of arithmetic allows (`UNIT` times `--budget`: matrix products
and convolutions, forward and backward, counted by torch), and measured on held-out captions. What is finished is kept,
so that an interrupted run goes on where it was, and several processes can share a folder. `--docs` needs matplotlib.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tmd_ref.distill import evaluate as table
from tmd_ref.distill import recipe
from tmd_ref.distill.config import Config, load_config
from tmd_ref.distill.data import encode_prompts
from tmd_ref.distill.weights import load_teacher, load_text_encoder, load_vae
from tmd_ref.student import load_student

UNIT = 10e12
"""FLOPs of `--budget 1`: about four minutes of one core of an AMD EPYC (Zen 4)."""
CAPTIONS = 256
COMMON = ["stage1.batch=16", "machine.log_every=10", "machine.save_every=100"]
COMMON += ["stage2.generator.lr=4e-4", "stage2.fake.lr=8e-4"]  # the best of four for both methods, on a seed apart
BASELINE = ["student.head_blocks=0"]
COLUMNS = ("shape", "color", "background", "motion", "all", "typed", "frechet", "diversity")


@dataclass(frozen=True)
class Row:
    """One line. `share`: how much of the budget stage 1 has; `settings`: what differs from the config `tiny`."""

    name: str
    share: float
    settings: tuple[str, ...] = ()


ROWS = {
    "dmd2-1": Row("DMD2-v, M = 1, after a warm-up", 0.35,
                  (*BASELINE, "student.outer_steps=1", "stage1.objective=kd", "stage1.pairs={shift: 3, guidance: 3}")),
    "dmd2-2": Row("DMD2-v, M = 2", 0, (*BASELINE,)),
    "dmd2-4": Row("DMD2-v, M = 4", 0, (*BASELINE, "student.outer_steps=4")),
    "tmd-1": Row("TMD, M = 1, N = 2", 0.35, ("student.outer_steps=1",)),
    "tmd-2": Row("TMD, M = 2, N = 2", 0.35),
    "tmd-4": Row("TMD, M = 4, N = 2", 0.35, ("student.outer_steps=4",)),
    # one experiment for each explanation of a difference
    "no-stage-1": Row("TMD, M = 2, N = 2, no stage 1", 0),
    "long-stage-1": Row("TMD, M = 2, N = 2, twice the stage 1", 0.7),
    "stage-1": Row("TMD, M = 2, N = 2, stage 1 only", 1),
    "h1": Row("TMD, M = 2, N = 2, H = 1", 0.35, ("student.head_blocks=1",)),
    "h4": Row("TMD, M = 2, N = 2, H = 4", 0.35, ("student.head_blocks=4",)),
    "n1": Row("TMD, M = 2, N = 1", 0.35, ("student.inner_steps=1",)),
    "n4": Row("TMD, M = 2, N = 4", 0.35, ("student.inner_steps=4",)),
    "concat": Row("TMD, M = 2, N = 2, concat", 0.35, ("student.fusion=concat",)),
    "no-rollout": Row("TMD, M = 2, N = 2, no rollout", 0.35, ("stage2.rollout=false",)),
    "tmd-gan": Row("TMD, M = 2, N = 2, with the discriminator", 0.35, ("stage2.gan_weight=0.03",)),
    "dmd2-gan": Row("DMD2-v, M = 2, with the discriminator", 0, (*BASELINE, "stage2.gan_weight=0.03")),
}  # fmt: skip
COMPARED = ("dmd2-1", "dmd2-2", "dmd2-4", "tmd-1", "tmd-2", "tmd-4")


def configured(row: Row, seed: int, *more: str) -> Config:
    seeds = [f"{stage}.seed={1000 * seed + number}" for number, stage in enumerate(("stage1", "stage2"), 1)]
    return load_config("tiny", [*COMMON, *seeds, *row.settings, *more])


def affordable(row: Row, inputs: Path, budget: float, *more: str) -> dict[str, int]:
    """How many steps of each stage, and pairs of the warm-up, a budget of FLOPs pays for: {"stage1.steps": 130, ...}.

    Half of the warm-up's share goes into its pairs. Stage 1 has a step at least, which makes the student.
    """

    def counted(stage: str, *steps: str) -> float:
        config = configured(row, 0, *more, *steps)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            getattr(recipe, stage)(recipe.Job(config, Path(folder), inputs, report=lambda line: None))
        for checkpoint in Path(folder).glob("*/checkpoint.pt"):
            checkpoint.unlink()
        return counter.get_total_flops()

    given = configured(row, 0, *more)
    warm_up, cycle = given.stage1.objective == "kd", given.stage2.ratio + 1
    steps = {}
    with TemporaryDirectory() as folder:
        if warm_up:
            few = "stage1.pairs.count=16"
            pairs_and_step, step = counted("stage1", "stage1.steps=1", few), counted("stage1", "stage1.steps=1", few)
            steps["stage1.pairs.count"] = max(16, round(row.share / 2 * budget / (pairs_and_step - step) * 16))
            steps["stage1.steps"] = max(1, round(row.share / 2 * budget / step))
        elif given.student.is_tmd:
            steps["stage1.steps"] = max(1, round(row.share * budget / counted("stage1", "stage1.steps=1")))
        if row.share < 1:
            of_cycle = counted("stage2", f"stage2.steps={cycle}")
            steps["stage2.steps"] = max(1, round((1 - row.share) * budget / of_cycle)) * cycle
    return steps


def train(row: Row, folder: Path, inputs: Path, seed: int, budget: float, *more: str) -> None:
    """The stages of a row -> its folder; what they cost -> cost.json."""
    took = folder / "cost.json"
    cost: dict[str, Any] = json.loads(took.read_text()) if took.exists() else {"seconds": {}}
    folder.mkdir(parents=True, exist_ok=True)
    if "steps" not in cost:
        cost["steps"] = affordable(row, inputs, budget * UNIT, *more)
        took.write_text(json.dumps(cost))
    config = configured(row, seed, *more, *(f"{key}={count}" for key, count in cost["steps"].items()))
    for stage in ("stage1", "stage2"):
        if f"{stage}.steps" in cost["steps"] and stage not in cost["seconds"]:
            click.echo(f"{folder}: {row.name}: {stage}, {cost['steps'][f'{stage}.steps']} steps")
            began = time.process_time()
            getattr(recipe, stage)(recipe.Job(config, folder, inputs, report=lambda line: None))
            cost["seconds"][stage] = time.process_time() - began
            took.write_text(json.dumps(cost))


def measure(row: Row | None, folder: Path, inputs: Path, *more: str) -> None:
    """A trained row, or the teacher, on the same captions as every other -> its evaluation.json and .png."""
    if (folder / "evaluation.json").exists():
        return
    config = configured(row or ROWS["tmd-2"], 0, *more)
    job = recipe.Job(config, folder, inputs)
    encoder, vae = load_text_encoder(job.find("umt5.safetensors")), load_vae(job.find("vae.safetensors"))
    shape, settings, student = (config.wan.in_channels, *config.data.latent_size), config.evaluate, config.student
    if row is None:
        negative = encode_prompts(encoder, job.tokenizer(), [""])
        made = table.teacher_row("teacher", job.load_teacher(), negative, 50, settings.shift, settings.guidance, shape)
    elif student.is_tmd:
        last = "student.safetensors" if row.share < 1 else "student_stage1.safetensors"
        network = load_student(folder / last).float().eval()
        made = table.student_row("row", network, student.outer_steps, student.inner_steps, shape)
    else:
        generator = load_teacher(folder / "generator.safetensors", config.wan)
        made = table.baseline_row("row", generator, student.outer_steps, student.outer_shift, shape)
    table.measure([made], vae, encoder, job.tokenizer(), folder, count=CAPTIONS, seed=settings.seed,
                  frames=config.data.frames, size=config.data.size)  # fmt: skip


Found = dict[str, dict[str, dict[str, dict[str, Any]]]]
KEPT = "distillation.json"


def collect(run: Path, docs: Path | None) -> Found:
    """{budget: {row: {seed: what it reached and took}}} of all that is finished, here and in what `docs` keeps; the
    teacher is in budget "0"."""
    found: Found = defaultdict(lambda: defaultdict(dict))
    if docs and (docs / KEPT).exists():
        for budget, rows in json.loads((docs / KEPT).read_text()).items():
            for name, seeds in rows.items():
                found[budget][name] |= seeds
    for path in sorted(run.glob("*x/*/*/evaluation.json")):
        cost = json.loads((path.parent / "cost.json").read_text())
        measured = json.loads(path.read_text())
        budget, seed, row = path.parts[-4].removesuffix("x"), path.parts[-3], path.parts[-2]
        by_motion = {motion: share["all"] for motion, share in measured["groups"]["row"]["motion"].items()}
        found[budget][row][seed] = {
            **measured["rows"]["row"],
            "typed": measured["typed"]["row"]["all"],
            "by motion": by_motion,
            "minutes": sum(cost["seconds"].values()) / 60,
        }
    for path in run.glob("teacher/evaluation.json"):
        rows = json.loads(path.read_text())["rows"]
        found["0"] = {name: {"": {**rows[name], "minutes": 0.0}} for name in ("autoencoder", "teacher")}
    return found


def report(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One table: mean and standard deviation over the seeds."""
    click.echo("| | seeds | CPU minutes | NFE | " + " | ".join(COLUMNS) + " |")
    click.echo("|---" * (4 + len(COLUMNS)) + "|")
    names = {"autoencoder": "rendered clips through the VAE", "teacher": "teacher, 50 x 2"}
    names |= {key: row.name for key, row in ROWS.items()}
    for key in sorted(rows, key=lambda key: list(names).index(key) if key in names else len(names)):
        seeds, cells = [*rows[key].values()], []
        for column in COLUMNS:
            values = np.array([seed[column] for seed in seeds if column in seed])
            scale, digits, unit = (1, 2, "") if column in ("frechet", "diversity") else (100, 1, " %")
            spread = f" ± {scale * values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{scale * values.mean():.{digits}f}{spread}{unit}" if len(values) else "")
        name, minutes = names.get(key, key), np.mean([seed["minutes"] for seed in seeds])
        click.echo(f"| {name} | {len(seeds)} | {minutes:.1f} | {seeds[0]['nfe']:g} | " + " | ".join(cells) + " |")


def report_motions(rows: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One table: all four right for each motion, means over the seeds that tell."""
    shares = {key: [seed["by motion"] for seed in seeds.values() if "by motion" in seed] for key, seeds in rows.items()}
    motions = sorted({motion for seeds in shares.values() for seed in seeds for motion in seed})
    if not motions:
        return
    click.echo("\n| | " + " | ".join(motions) + " |")
    click.echo("|---" * (1 + len(motions)) + "|")
    for key, seeds in shares.items():
        if seeds:
            cells = (f"{100 * np.mean([seed[motion] for seed in seeds]):.0f} %" for motion in motions)
            click.echo(f"| {ROWS[key].name if key in ROWS else key} | " + " | ".join(cells) + " |")


def plot(found: Found, folder: Path) -> None:
    """distillation.png: whole scenes right and Fréchet distance over NFE, for each budget."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    curves = {"DMD2-v": ("dmd2-1", "dmd2-2", "dmd2-4"), "TMD": ("tmd-1", "tmd-2", "tmd-4")}
    for axis, column, title in ((axes[0], "all", "all four right, %"), (axes[1], "frechet", "Fréchet distance")):
        scale = 100 if column == "all" else 1
        budgets = sorted(set(found) - {"0"}, key=float)
        for budget, style, marker in zip(budgets, ("--", "-", ":"), ("o", "s", "^"), strict=False):
            for (name, keys), color in zip(curves.items(), ("C0", "C1"), strict=True):
                seeds = [[*found[budget][key].values()] for key in keys if found[budget][key]]
                values = [[scale * seed[column] for seed in row] for row in seeds]
                axis.errorbar([row[0]["nfe"] for row in seeds], [np.mean(v) for v in values],
                              [np.std(v) for v in values], c=color, ls=style, marker=marker, capsize=3,
                              label=f"{name}, budget {budget}")  # fmt: skip
        for name, style in (("teacher", "-."), ("autoencoder", ":")):
            if name in found["0"]:
                axis.axhline(scale * found["0"][name][""][column], ls=style, c="gray", lw=1, label=name)
        axis.set(xlabel="NFE", title=title)
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "distillation.png", dpi=90)


@click.command(help=__doc__)
@click.option("--inputs", type=click.Path(path_type=Path, exists=True), help="Train and measure with what is there.")
@click.option("--run", type=click.Path(path_type=Path), required=True)
@click.option("--budget", default=1.0, show_default=True)
@click.option("--seed", "seeds", multiple=True, default=(1,), show_default=True)
@click.option("--row", "chosen", multiple=True, type=click.Choice([*ROWS]), default=COMPARED, help="Default: six rows.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A trial: goes into the row's name.")
@click.option("--threads", default=1, show_default=True)
@click.option("--docs", type=click.Path(path_type=Path, exists=True), help="Folder of distillation.json and .png.")
def main(
    inputs: Path | None, run: Path, budget: float, seeds: tuple[int, ...], chosen: tuple[str, ...],
    settings: tuple[str, ...], threads: int, docs: Path | None,
) -> None:  # fmt: skip
    torch.set_num_threads(threads)
    if inputs:
        measure(None, run / "teacher", inputs)
        for seed in seeds:
            for key in chosen:
                folder = run / f"{budget:g}x" / str(seed) / " ".join((key, *settings))
                train(ROWS[key], folder, inputs, seed, budget, *settings)
                measure(ROWS[key], folder, inputs, *settings)
    found = collect(run, docs)
    for name, rows in found.items():
        click.echo(f"\nbudget {name}\n")
        report(rows)
        report_motions(rows)
    if docs:
        kept = {budget: {key: rows[key] for key in rows if " " not in key} for budget, rows in found.items()}
        (docs / KEPT).write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")  # without trials
        plot(found, docs)


if __name__ == "__main__":
    main()
