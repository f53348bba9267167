"""The runtime beside every rival, stage by stage: runs `tmd-bench` once per line of a plan and prints one table.

    python -m benchmarks.contest --work /big/disk                 # every line, about an hour and a half on two cores
    python -m benchmarks.contest --work /big/disk --only denoise  # the lines with this word
    python -m benchmarks.contest --work /big/disk --list

Weights are random and of the full size of Wan2.1-1.3B. All contenders of a line get the same weights, size, steps and
threads; each is loaded in a process of its own, runs once unmeasured and then its rounds, before the next one loads:
memory holds no two of them. A line that is finished is kept in results.json, so that an interrupted run goes on where
it was. stable-diffusion.cpp needs `pip install stable-diffusion-cpp-python`, which builds it for the machine. Disk: 3
to 12 GB per precision and part, kept in the folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

PARTS = {"text": "text_encoder", "denoise": "backbone,flow_head", "decode": "decoder_first,decoder_step"}
PRECISION_OF = {"text": "text_encoder", "denoise": "", "decode": "decoder"}
SDCPP = "stable-diffusion.cpp"
OURS = "openvino"


@dataclass(frozen=True)
class Line:
    """One contest. `stages` are measured in one run; `rounds` are measured runs after a first one that is not."""

    stages: tuple[str, ...]
    precision: str
    rivals: tuple[str, ...]
    kind: str = "tmd"
    size: str = "256x256"
    frames: int = 17
    steps: int = 1
    inner_steps: int = 2
    threads: int = 2
    rounds: int = 1

    @property
    def name(self) -> str:
        steps = {"tmd": f"{self.steps}x{self.inner_steps} steps", "wan": f"{self.steps} steps"}[self.kind]
        work = [self.kind, steps] if "denoise" in self.stages else []
        size = [] if self.stages == ("text",) else [f"{self.size}x{self.frames}"]
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return ", ".join((" + ".join(self.stages), self.precision, *work, *size, threads))

    @property
    def bundle(self) -> str:
        return "-".join((self.kind, *self.stages, self.precision))

    def export(self) -> list[str]:
        """Options of `tmd-bench` that make the bundle."""
        parts = ",".join(PARTS[stage] for stage in self.stages)
        if self.stages == ("text",) and self.precision == "int8":
            return ["--parts", parts, "--text-encoder-weights", "int8"]
        precisions = (f"{PRECISION_OF[stage]}={self.precision}".lstrip("=") for stage in self.stages)
        return ["--parts", parts, "--precision", ",".join(precisions)]


WHOLE, DENOISE, DECODE, TEXT = ("denoise", "decode"), ("denoise",), ("decode",), ("text",)
TORCH = ("torch-compile", "diffusers")
PLAN = (
    Line(WHOLE, "bf16", (*TORCH, "onnxruntime")),
    Line(WHOLE, "bf16", ("diffusers", SDCPP), frames=5),
    Line(WHOLE, "int8", ("diffusers", SDCPP), frames=5),
    Line(DENOISE, "bf16", TORCH, threads=1, rounds=2),
    Line(DENOISE, "bf16", TORCH, kind="wan", rounds=2),
    Line(DENOISE, "bf16", TORCH, size="480x272", frames=33),
    Line(DECODE, "int8", TORCH, threads=1),
    Line(DECODE, "int8", ("diffusers",), size="480x272", frames=33),
    Line(TEXT, "bf16", ("diffusers",), rounds=2),
    Line(TEXT, "int8", ("diffusers",), rounds=2),
)


def measure(line: Line, work: Path) -> dict[str, Any]:
    """What `tmd-bench --json` says of a line; the bundle stays in `work` for other lines with the same graphs."""
    bundle, found = work / line.bundle, work / "line.json"
    place = ["--bundle", bundle] if bundle.is_dir() else ["--keep", bundle, *line.export()]
    origin = ["--model", "wan1.3b", "--random-weights", "0", "--kind", line.kind]
    how = ["--size", line.size, "--frames", line.frames, "--steps", line.steps, "--threads", line.threads]
    how += ["--inner-steps", line.inner_steps] if line.kind == "tmd" else []
    how += ["--engine", OURS, "--compare", ",".join(line.rivals), "--rounds", line.rounds, "--apart", "--json", found]
    command = [sys.executable, "-m", "tmd_bench", *map(str, (*origin, *place, *how))]
    subprocess.run(command, check=True, stdout=sys.stderr)
    document: dict[str, Any] = json.loads(found.read_text())
    return document


def table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row per line, contender and stage, our own first."""
    yield "| | contender | stage | clock | of ours | cold | resident | of ours | without mapped files |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for line in PLAN:
        found = results.get(line.name)
        if found is None:
            continue
        entries = found["contenders"]
        title = line.name
        for name, entry in entries.items():
            shown = name
            memory = f"{entry['peak_bytes'] / 1e9:.2f} GB"
            larger = "" if name == OURS else f"{entry['peak_bytes'] / entries[OURS]['peak_bytes']:.2f}"
            memory += f" | {larger} | {entry['peak_anonymous_bytes'] / 1e9:.2f} GB"
            for stage in line.stages:
                ratio = found["ratio"].get(name, {}).get(stage)
                cold = entry["cold_seconds"].get(stage, 0.0)
                times = f"{entry['seconds'][stage]['median']:.1f} s | {'' if ratio is None else f'{ratio:.2f}'}"
                yield f"| {title} | {shown} | {stage} | {times} | {cold:.1f} s | {memory} |"
                title, shown, memory = "", "", " | | "


@click.command(help=__doc__)
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for large files.")
@click.option("--only", default="", help="Lines whose name has this word.")
@click.option("--list", "show", is_flag=True, help="Print the names of all lines.")
def main(work: Path, only: str, show: bool) -> None:
    lines = [line for line in PLAN if only in line.name]
    if show:
        click.echo("\n".join(line.name for line in lines))
        return
    work.mkdir(parents=True, exist_ok=True)
    file = work / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for line in lines:
        if line.name not in results:
            click.echo(line.name, err=True)
            results[line.name] = measure(line, work)
            file.write_text(json.dumps(results, indent=1))
    click.echo("\n".join(table(results)))


if __name__ == "__main__":
    main()
