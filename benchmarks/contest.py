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
SDCPP = "stable-diffusion.cpp"
OURS = "openvino"


@dataclass(frozen=True)
class Line:
    """One contest. `rounds` are measured runs after a first one that is not."""

    stage: str
    precision: str
    rivals: tuple[str, ...]
    kind: str = "tmd"
    size: str = "256x256"
    frames: int = 17
    steps: int = 2
    inner_steps: int = 2
    threads: int = 2
    rounds: int = 2

    @property
    def stage_part(self) -> str:
        """The graphs of the stage, as `--precision` calls them."""
        return {"text": "text_encoder", "decode": "decoder"}[self.stage]

    @property
    def name(self) -> str:
        steps = {"tmd": f" {self.steps}x{self.inner_steps} steps", "wan": f" {self.steps} steps"}[self.kind]
        work = f" {self.kind}{steps}" if self.stage == "denoise" else ""
        size = "" if self.stage == "text" else f" {self.size}x{self.frames}"
        return f"{self.stage} {self.precision}{work}{size}, {self.threads} thread{'s' * (self.threads > 1)}"


TORCH = ("torch-compile", "diffusers")
PLAN = (
    Line("denoise", "bf16", (*TORCH, "onnxruntime", SDCPP)),
    Line("denoise", "int8", (*TORCH, SDCPP)),
    Line("denoise", "bf16", TORCH, threads=1),
    Line("denoise", "bf16", TORCH, kind="wan", steps=1),
    Line("denoise", "bf16", TORCH, size="480x272", frames=33, steps=1, rounds=1),
    Line("decode", "int8", (*TORCH, SDCPP), rounds=1),
    Line("decode", "bf16", (*TORCH, "onnxruntime"), rounds=1),
    Line("decode", "int8", TORCH, threads=1, rounds=1),
    Line("decode", "int8", TORCH, size="480x272", frames=33, rounds=1),
    Line("text", "bf16", TORCH),
    Line("text", "int8", TORCH),
)


def measure(line: Line, work: Path) -> dict[str, Any]:
    """What `tmd-bench --json` says of a line; the bundle stays in `work` for other lines with the same graphs."""
    bundle = work / f"{line.kind}-{line.stage}-{line.precision}"
    found = work / "line.json"
    origin = ["--model", "wan1.3b", "--random-weights", "0", "--kind", line.kind]
    place = ["--bundle", bundle] if bundle.is_dir() else ["--keep", bundle, "--parts", PARTS[line.stage]]
    if not bundle.is_dir() and line.stage == "text" and line.precision == "int8":
        place += ["--text-encoder-weights", "int8"]
    elif not bundle.is_dir():
        place += ["--precision", line.precision if line.stage == "denoise" else f"{line.stage_part}={line.precision}"]
    how = ["--size", line.size, "--frames", line.frames, "--steps", line.steps, "--threads", line.threads]
    how += ["--inner-steps", line.inner_steps] if line.kind == "tmd" else []
    how += ["--engine", OURS, "--compare", ",".join(line.rivals), "--rounds", line.rounds, "--apart", "--json", found]
    command = [sys.executable, "-m", "tmd_bench", *map(str, (*origin, *place, *how))]
    subprocess.run(command, check=True, stdout=sys.stderr)
    document: dict[str, Any] = json.loads(found.read_text())
    return document


def table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a row per line and contender, our own first."""
    yield "| | contender | clock, median | of ours | processor, of ours | cold | resident | without mapped files |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in PLAN:
        found = results.get(line.name)
        if found is None:
            continue
        for name, entry in found["contenders"].items():
            median = entry["seconds"][line.stage]["median"]
            ratio = found["ratio"].get(name, {})
            beside = " | ".join(f"{ratio[key]:.2f}" if key in ratio else "" for key in (line.stage, "cpu"))
            memory = f"{entry['peak_bytes'] / 1e9:.2f} GB | {entry['peak_anonymous_bytes'] / 1e9:.2f} GB"
            cold = entry["cold_seconds"].get(line.stage, 0.0)
            title = line.name if name == OURS else ""
            yield f"| {title} | {name} | {median:.1f} s | {beside} | {cold:.1f} s | {memory} |"


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
