"""What each precision does to the built-in model: the tables of docs/precision.md.

    python benchmarks/precision.py                              # exports into a temporary folder, prints the tables
    python benchmarks/precision.py --write docs/precision.md    # and puts them there, between the marks
    python benchmarks/precision.py --folder DIR                 # keeps the bundles, and takes those that are there

Backbone and flow head of every precision are run over whole samplings on ONNX Runtime, which computes in float32 and
rounds each value where the graph says so. Prompts and noise are the same for all; the rest of the line (text encoder,
decoder) is that of fp32, so that nothing else changes. A few minutes on one core.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ms_ssim import ms_ssim
from tmd_engines import Bundle
from tmd_engines.bundle import format_size
from tmd_engines.onnxruntime_engine import OnnxRuntimeEngine
from tmd_export import export_bundle, open_source
from tmd_export.quantization.calibration import FILE, read_calibration
from tmd_export.quantization.prompts import default_prompts
from tmd_export.quantization.rollout import rollout
from tmd_ref.wan import rope_tables

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8")
GRAPHS = ("backbone", "flow_head")
STEPS = ((1, 1), (2, 2), (4, 4))
SCALES = 3  # of MS-SSIM: pictures of 64 pixels have no more
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
SHOWN_LAYERS = 12


class Model:
    """Backbone and flow head of a bundle, each value rounded as the graph says."""

    def __init__(self, bundle: Bundle, engines: ExitStack) -> None:
        self._engines = {
            name: engines.enter_context(OnnxRuntimeEngine(bundle, name, "cpu", 1, as_stored=True)) for name in GRAPHS
        }
        self.manifest = bundle.manifest
        self.recorded: dict[str, list[Any]] = {}  # graph -> inputs and outputs of its passes

    def __getitem__(self, name: str) -> Any:
        engine = self._engines[name]

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            sizes = dict(
                zip(("frames", "height", "width"), inputs["x" if "x" in inputs else "y"].shape[2:], strict=True)
            )
            text = inputs["prompt_embeds" if "prompt_embeds" in inputs else "context"].shape[1]
            dims = {"batch": 1, "text": text, "tokens": len(inputs["rope_cos"]), **sizes}
            outputs = {output: engine.empty(output, **dims) for output in engine.outputs}
            engine.run({key: np.ascontiguousarray(value) for key, value in inputs.items()}, outputs)
            if name in self.recorded:
                self.recorded[name].append((dict(inputs), outputs))
            return outputs

        return run

    def latents(self, embeds: np.ndarray, seed: int, steps: int, inner: int) -> np.ndarray:
        info = self.manifest
        video, stride = info.video, info.latents.spatial_stride
        shape = (1 + (video.frames - 1) // info.latents.temporal_stride, video.height // stride, video.width // stride)
        grid = [size // patch for size, patch in zip(shape, info.model.patch_size, strict=True)]
        cos, sin = (table.numpy() for table in rope_tables(*grid, info.model.head_dim))
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((1, info.latents.channels, *shape), np.float32)
        rope = {"rope_cos": cos, "rope_sin": sin}
        sampler = info.sampler.model_dump()
        return rollout(self[GRAPHS[0]], self[GRAPHS[1]], sampler, rng, noise, embeds, embeds, rope, steps, inner)


def export(folder: Path) -> dict[str, Bundle]:
    """Bundle by precision; int8 on the calibration of fp8."""
    found = {}
    for precision in PRECISIONS:
        path, options = folder / precision, {}
        if precision == "int8":
            options["calibration"] = read_calibration(folder / "fp8" / FILE)
        if not path.exists():
            click.echo(f"exporting {precision}", err=True)
            parts = None if precision == "fp32" else ("text_encoder", *GRAPHS)
            export_bundle(open_source("tiny"), path, parts, precision=precision, **options)
        found[precision] = Bundle.open(path)
    return found


def frames_table(models: dict[str, Model], pipeline: Any, embeds: list[np.ndarray]) -> list[str]:
    """MS-SSIM of frames and relative L2 of latents against fp32, by number of steps."""
    rows = {precision: [f"| {precision} |"] for precision in PRECISIONS[1:]}
    for steps, inner in STEPS:
        made = {
            precision: [model.latents(one, seed, steps, inner) for seed, one in enumerate(embeds)]
            for precision, model in models.items()
        }
        frames = {name: [pipeline.decode(latents) for latents in made[name]] for name in made}
        for precision, row in rows.items():
            pairs = list(zip(frames[precision], frames["fp32"], strict=True))
            likeness = [ms_ssim(one, other, SCALES) for one, other in pairs]
            error = np.linalg.norm(np.array(made[precision]) - made["fp32"]) / np.linalg.norm(made["fp32"])
            row.append(f" {error:.4f} | {np.mean(likeness):.4f} (worst {min(likeness):.4f}) |")
    head = "".join(f" {steps} × {inner}: latents, relative L2 | frames, MS-SSIM |" for steps, inner in STEPS)
    return [f"| |{head}", "|---|" + "---|---|" * len(STEPS), *("".join(row) for row in rows.values())]


def graphs_table(bundles: dict[str, Bundle], models: dict[str, Model], embeds: list[np.ndarray]) -> list[str]:
    """Each graph on the inputs that it has in samplings in fp32: cosine of the worst pass, relative L2, size."""
    head = "".join(f" relative L2, {steps} × {inner} |" for steps, inner in STEPS)
    lines = [f"| | graph | size | cosine, worst pass |{head}", "|---|---|---|---|" + "---|" * len(STEPS)]
    passes: dict[str, dict[tuple[int, int], list[Any]]] = {name: {} for name in GRAPHS}
    for count in STEPS:
        for name in GRAPHS:
            passes[name][count] = models["fp32"].recorded[name] = []
        for seed, one in enumerate(embeds):
            models["fp32"].latents(one, seed, *count)
    models["fp32"].recorded.clear()
    for precision, bundle in bundles.items():
        for name in GRAPHS:
            info = bundle.graph_info(name)
            size = format_size(sum(bundle.manifest.files[file].size for file in (info.file, info.data) if file))
            if precision == "fp32":
                lines.append(f"| fp32 | {name} | {size} | |" + " |" * len(STEPS))
                continue
            cosines, errors = [], []
            for found in passes[name].values():
                squares = np.zeros(2)
                for inputs, outputs in found:
                    (output, want), *_ = outputs.items()
                    have = models[precision][name](inputs)[output]
                    squares += np.square(have - want).sum(), np.square(want).sum()
                    cosines.append(np.vdot(have, want) / np.linalg.norm(have) / np.linalg.norm(want))
                errors.append(f" {np.sqrt(squares[0] / squares[1]):.4f} |")
            lines.append(f"| {precision} | {name} | {size} | {min(cosines):.5f} |" + "".join(errors))
    return lines


def layers_table(bundles: dict[str, Bundle]) -> list[str]:
    """The layers that change a graph's result most, alone."""
    lines = []
    for name in GRAPHS:
        tables = {
            said: read_calibration(bundles["int8"].folder / FILE).sensitivity[said][name] for said in ("fp8", "int8")
        }
        ranked = sorted({layer for table in tables.values() for layer in table.layers}, reverse=True,
                        key=lambda layer: max(table.layers.get(layer, 0.0) for table in tables.values()))  # fmt: skip
        lines += [f"| {name}, relative L2 | fp8 | int8 |", "|---|---|---|"]
        cells = [("all", *(table.everything for table in tables.values()))]
        cells += [(layer, *(table.layers.get(layer) for table in tables.values())) for layer in ranked[:SHOWN_LAYERS]]
        rest = [
            [table.layers[layer] for layer in ranked[SHOWN_LAYERS:] if layer in table.layers]
            for table in tables.values()
        ]
        cells.append(
            (f"the other {len(ranked) - SHOWN_LAYERS}: median", *(float(np.median(values)) for values in rest))
        )
        lines += [
            "| " + " | ".join("–" if c is None else c if isinstance(c, str) else f"{c:.4f}" for c in row) + " |"
            for row in cells
        ]
        kept = "; ".join(f"{said}: {', '.join(table.kept) or 'none'}" for said, table in tables.items())
        lines += ["", f"Kept in bf16: {kept}.", ""]
    return lines


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where the bundles are, or shall be kept.")
@click.option("--write", type=click.Path(path_type=Path, exists=True), help="The page to put the tables into.")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1, 8), help="Videos per row.")
def main(folder: Path | None, write: Path | None, prompts: int) -> None:
    """Measures the built-in model in every precision."""
    from tmd_runtime.pipeline import load

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as opened:
        bundles = export(folder or Path(temporary))
        pipeline = opened.enter_context(load(bundles["fp32"].folder))
        models = {precision: Model(bundle, opened) for precision, bundle in bundles.items()}
        embeds = [pipeline.encode(prompt) for prompt in default_prompts("tiny")[:prompts]]
        held_out = [pipeline.encode(prompt) for prompt in default_prompts("tiny", held_out=True)]
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "numpy"))
        source = bundles["fp32"].manifest.provenance.source_sha256["student.safetensors"][:12]
        lines = [
            f"Built-in model, student.safetensors {source}; {libraries}, Python {platform.python_version()}, "
            f"{platform.machine()}.",
            "",
            *graphs_table(bundles, models, held_out),
            "",
            f"{len(embeds)} videos, against fp32:",
            "",
            *frames_table(models, pipeline, embeds),
            "",
            *layers_table(bundles),
        ]
    text = "\n".join(lines).strip() + "\n"
    click.echo(text)
    if write:
        page = write.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        after = rest.partition(END)[2]
        write.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
