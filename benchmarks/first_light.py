"""First light on a card: does it run, is it right, how fast is it, what does it take? Anybody with a GPU can answer.

    python benchmarks/first_light.py                                    # the built-in models; a few minutes
    python benchmarks/first_light.py --bundle wan13b-bf16 --bundle wan13b-fp8 --size 832x480 --frames 81

A bundle of full size comes from `tmd-export --model wan1.3b --random-weights 0 --precision bf16 --out wan13b-bf16`;
speed and memory do not depend on the weights. Each step is one entry of first_light.json and one row of first_light.md;
a step that this machine cannot do says what it would have done, and why it did not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click
import numpy as np

import tmd_runtime
from tmd_engines import Bundle, BundleError, EngineError
from tmd_engines.command.built_in import open_bundle
from tmd_engines.command.doctor import examine
from tmd_engines.command.verify import verify
from tmd_engines.registry import engine_names
from tmd_runtime import Pipeline, RuntimeFailure, StepInfo

BUILT_IN = ("builtin:tiny", "builtin:tim-tiny")
REPEATS = 3
Row = dict[str, Any]
Step = tuple[str, Callable[[], Row]]


def versions(engine: str) -> Row:
    """What is installed here."""
    found = examine()
    return {"engine": found["engines"].get(engine), "nvidia": found["nvidia"], "python": found["python"]}


def right(bundle: Bundle, engine: str) -> Row:
    """Every graph on the card against ONNX Runtime in float32 on the CPU."""
    checks = list(verify(bundle, engine))
    failed = {check.graph: check.problem for check in checks if check.problem is not None}
    if failed:
        raise EngineError("; ".join(f"{graph}: {problem}" for graph, problem in failed.items()))
    return {check.graph: check.cosine if check.cosine is not None else check.max_levels for check in checks}


def denoise(pipeline: Pipeline, size: tuple[int, int] | None, frames: int | None) -> Row:
    """Seconds of the denoising, cold and then `REPEATS` times warm, and the host's share of an inner step."""
    text, classes = pipeline.manifest.text, pipeline.manifest.family.classes(pipeline.manifest.model)
    embeds = None if classes else np.zeros((1, text.max_length, text.dim), np.float32)
    passes = pipeline.manifest.family.passes(pipeline.manifest.sampler)
    wishes: dict[str, Any] = {"seed": 0, "size": size, "frames": frames, "label": 0 if classes else None}
    inside: list[float] = []

    def once() -> float:
        inside.clear()
        start = perf_counter()
        pipeline.denoise(embeds, callback=keep, negative_embeds=embeds if passes == 2 else None, **wishes)
        return perf_counter() - start

    def keep(step: StepInfo) -> None:
        if step.stage in ("backbone", "flow_head"):
            inside.append(step.seconds)

    cold = once()
    warm = [once() for _ in range(REPEATS)]
    return {
        "cold": round(cold, 4),
        "warm": [round(each, 4) for each in sorted(warm)],
        "median": round(median(warm), 4),
        "outside_graphs_per_call": round(max(warm[-1] - sum(inside), 0.0) / max(len(inside), 1), 7),
        "calls": len(inside),
    }


def decode(pipeline: Pipeline, size: tuple[int, int] | None, frames: int | None) -> Row:
    """Seconds from latents to pixels, cold and warm."""
    classes = pipeline.manifest.family.classes(pipeline.manifest.model)
    settings = pipeline.settings(seed=0, size=size, frames=frames, label=0 if classes else None)
    latents = np.random.default_rng(0).standard_normal(settings.latent_shape, np.float32)
    seconds = []
    for _ in range(1 + REPEATS):
        start = perf_counter()
        made = pipeline.decode(latents)
        seconds.append(round(perf_counter() - start, 4))
    return {"cold": seconds[0], "warm": sorted(seconds[1:]), "median": median(seconds[1:]), "frames": len(made)}


def memory() -> Row:
    """Bytes in use on the card, and what it has."""
    from cuda.bindings import runtime

    from tmd_engines.device.cuda import check

    free, total = check(runtime.cudaMemGetInfo())
    return {"used": total - free, "total": total}


def steps(
    bundles: list[str], engine: str, device: str, size: tuple[int, int] | None, frames: int | None
) -> Iterator[Step]:
    """(what it does, how) in turn."""
    yield f"ask for the versions of {engine}, CUDA and the driver", lambda: versions(engine)
    for name in (*BUILT_IN, *bundles):
        own = name in BUILT_IN
        yield f"verify every graph of {name}", lambda name=name: right(open_bundle(name), engine)  # type: ignore[misc]
        pipeline: list[Pipeline] = []

        def opened(name: str = name, pipeline: list[Pipeline] = pipeline) -> Pipeline:
            if not pipeline:
                pipeline.append(tmd_runtime.load(open_bundle(name), engine=engine, device=device))
            return pipeline[0]

        wanted = (None, None) if own else (size, frames)
        yield f"denoise with {name}", lambda opened=opened, wanted=wanted: denoise(opened(), *wanted)  # type: ignore[misc]
        yield f"decode with {name}", lambda opened=opened, wanted=wanted: decode(opened(), *wanted)  # type: ignore[misc]
        if device != "cpu":
            yield f"read the memory of the card after {name}", memory
        for each in pipeline:
            each.close()


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| step | seconds | result |", "|---|---|---|"]
    for row in rows:
        result = row.get("not_done") or json.dumps(row["result"])
        lines.append(f"| {row['step']} | {row['seconds']:.2f} | {result.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise click.UsageError(f"{text} is not a size: write it as 832x480.")
    return int(width), int(height)


@click.command()
@click.option("--bundle", "bundles", multiple=True, help="A folder to measure beside the built-in models.")
@click.option("--engine", type=click.Choice(engine_names()[1:]), default="tensorrt-rtx", show_default=True)
@click.option("--device", default="cuda", show_default=True, help="cpu tries the script without a card.")
@click.option("--size", help="Of the videos of --bundle, such as 832x480. Default: the bundle's.")
@click.option("--frames", type=int, help="Their number. Default: the bundle's.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("."), show_default=True, help="Folder of the results."
)
def main(bundles: tuple[str, ...], engine: str, device: str, size: str | None, frames: int | None, out: Path) -> None:
    """Runs every step and writes first_light.json and first_light.md."""
    rows: list[Row] = []
    for what, work in steps(list(bundles), engine, device, parse_size(size), frames):
        start = perf_counter()
        row: Row = {"step": what}
        try:
            row["result"] = work()
        except (EngineError, BundleError, RuntimeFailure, ImportError, RuntimeError) as error:  # the last: CUDA's own
            row["not_done"] = f"would {what}, but: {error}"
        row["seconds"] = perf_counter() - start
        rows.append(row)
        click.echo(f"{what}: {row.get('not_done') or json.dumps(row['result'])}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "first_light.json").write_text(json.dumps(rows, indent=1) + "\n")
    (out / "first_light.md").write_text(table(rows))


if __name__ == "__main__":
    main()
