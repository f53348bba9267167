"""What each precision does to the built-in model: the tables of docs/precision.md, and of docs/tim-log.md.

    python benchmarks/precision.py                              # exports into a temporary folder, prints the tables
    python benchmarks/precision.py --write docs/precision.md    # and puts them there, between the marks
    python benchmarks/precision.py --folder DIR                 # keeps the bundles, and takes those that are there
    python benchmarks/precision.py --model tim-tiny --checkpoint DIR --write docs/tim-log.md

Backbone and flow head of every precision are run over whole samplings on ONNX Runtime, which computes in float32 and
rounds each value where the graph says so. Prompts and noise are the same for all; the rest of the line (text encoder,
decoder) is that of fp32, so that nothing else changes. A few minutes on one core.
"""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.ms_ssim import ms_ssim
from tmd_engines import Bundle, Engine, Step
from tmd_engines.bundle.reader import format_size
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine
from tmd_export import export_bundle, open_source
from tmd_export.families import FAMILIES
from tmd_export.families.tim import JUMPS
from tmd_export.quantization.calibration import FILE, read_calibration
from tmd_export.quantization.prompts import default_prompts
from tmd_export.quantization.samplings import Condition, Samplings

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "int8", "nvfp4")
CALIBRATED = ("fp8", "int8", "nvfp4")  # each on the calibration of the one before
GRAPHS = ("backbone", "flow_head")
STEPS = {"tiny": ((1, 1), (2, 2), (4, 4)), "tim-tiny": tuple((steps,) for steps in JUMPS)}
SCALES = 3  # of MS-SSIM: pictures of 64 pixels have no more
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
SHOWN_LAYERS = 12

Arrays = dict[str, np.ndarray]
Counts = tuple[tuple[int, ...], ...]  # steps, and inner steps of models that have any


class Watched(Engine):
    """A graph whose every value is rounded as it says. `watch` gets the inputs and outputs of each run."""

    def __init__(self, bundle: Bundle, graph: str) -> None:
        info = bundle.graph_info(graph)
        super().__init__(graph, info.inputs, info.outputs)
        self._engine = OnnxRuntimeEngine(bundle, graph, "cpu", 1, as_stored=True)
        self.watch: Callable[[Arrays, Arrays], object] | None = None

    def empty(self, name: str, **dims: int) -> np.ndarray:
        return self._engine.empty(name, **dims)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Step:
        run = self._engine.bind(inputs, outputs)

        def step() -> None:
            run()
            if self.watch is not None:
                self.watch(dict(inputs), dict(outputs))

        return step

    def close(self) -> None:
        self._engine.close()

    def __call__(self, inputs: Arrays) -> Arrays:
        """The outputs for these inputs."""
        dims = sizes(self.inputs.values(), inputs)
        outputs = {output: self.empty(output, **dims) for output in self.outputs}
        self._engine.run(inputs, outputs)
        return outputs


class Model:
    """Backbone and flow head of a bundle, run as the runtime runs them."""

    def __init__(self, bundle: Bundle, engines: ExitStack) -> None:
        self.graphs = {name: Watched(bundle, name) for name in GRAPHS}
        self._family = FAMILIES[bundle.manifest.model.family]
        for graph in self.graphs.values():
            engines.callback(graph.close)
        update = engines.enter_context(OnnxRuntimeEngine(bundle, "update", "cpu", 1))
        self._samplings = Samplings(bundle.manifest, self._family, {**self.graphs, "update": update})

    def latents(self, embeds: np.ndarray, seed: int, steps: int, inner_steps: int = 1) -> np.ndarray:
        return self._samplings.run(Condition(embeds, embeds), seed, steps, inner_steps)

    def record(self, name: str, passes: list[tuple[Arrays, Arrays]]) -> None:
        """From here on, the passes of a graph go to `passes`."""
        graph, family = self.graphs[name], self._family

        def keep(inputs: Arrays, outputs: Arrays) -> None:
            for given in (inputs, *family.beside(name, inputs)):
                compared = {key: np.array(value) for key, value in family.compared(name, given).items()}
                passes.append((compared, graph(compared)))

        graph.watch = keep

    def stop_recording(self) -> None:
        for graph in self.graphs.values():
            graph.watch = None


def sizes(specs: Any, inputs: dict[str, np.ndarray]) -> dict[str, int]:
    """The sizes that the inputs of a graph have, by symbol."""
    return {
        symbol: size
        for spec in specs
        for symbol, size in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(symbol, str)
    }


def export(folder: Path, model: str, checkpoint: Path | None) -> dict[str, Bundle]:
    """Bundle by precision."""
    found = {}
    for precision in PRECISIONS:
        path = folder / precision
        options: dict[str, Any] = {}
        if precision in CALIBRATED[1:]:
            before = CALIBRATED[CALIBRATED.index(precision) - 1]
            options["calibration"] = read_calibration(folder / before / FILE)
        if not path.exists():
            click.echo(f"exporting {precision}", err=True)
            parts = None if precision == "fp32" else ("text_encoder", *GRAPHS)
            export_bundle(open_source(model, checkpoint), path, parts, precision=precision, **options)
        found[precision] = Bundle.open(path)
    return found


def frames_table(models: dict[str, Model], pipeline: Any, embeds: list[np.ndarray], counts: Counts) -> list[str]:
    """MS-SSIM of frames and relative L2 of latents against fp32, by number of steps."""
    rows = {precision: [f"| {precision} |"] for precision in PRECISIONS[1:]}
    for count in counts:
        made = {
            precision: [model.latents(one, seed, *count) for seed, one in enumerate(embeds)]
            for precision, model in models.items()
        }
        frames = {name: [pipeline.decode(latents) for latents in made[name]] for name in made}
        for precision, row in rows.items():
            pairs = list(zip(frames[precision], frames["fp32"], strict=True))
            likeness = [ms_ssim(one, other, SCALES) for one, other in pairs]
            error = np.linalg.norm(np.array(made[precision]) - made["fp32"]) / np.linalg.norm(made["fp32"])
            row.append(f" {error:.4f} | {np.mean(likeness):.4f} (worst {min(likeness):.4f}) |")
    head = "".join(f" {' × '.join(map(str, count))}: latents, relative L2 | frames, MS-SSIM |" for count in counts)
    return [f"| |{head}", "|---|" + "---|---|" * len(counts), *("".join(row) for row in rows.values())]


def graphs_table(
    bundles: dict[str, Bundle], models: dict[str, Model], embeds: list[np.ndarray], counts: Counts
) -> list[str]:
    """Each graph on the inputs that it has in samplings in fp32: cosine of the worst pass, relative L2, size."""
    head = "".join(f" relative L2, {' × '.join(map(str, count))} |" for count in counts)
    lines = [f"| | graph | size | cosine, worst pass |{head}", "|---|---|---|---|" + "---|" * len(counts)]
    passes: dict[str, dict[tuple[int, ...], list[Any]]] = {name: {} for name in GRAPHS}
    for count in counts:
        for name in GRAPHS:
            models["fp32"].record(name, passes[name].setdefault(count, []))
        for seed, one in enumerate(embeds):
            models["fp32"].latents(one, seed, *count)
    models["fp32"].stop_recording()
    for precision, bundle in bundles.items():
        for name in GRAPHS:
            info = bundle.graph_info(name)
            size = format_size(sum(bundle.manifest.files[file].size for file in (info.file, info.data) if file))
            if precision == "fp32":
                lines.append(f"| fp32 | {name} | {size} | |" + " |" * len(counts))
                continue
            cosines, errors = [], []
            for found in passes[name].values():
                squares = np.zeros(2)
                for inputs, outputs in found:
                    (output, want), *_ = outputs.items()
                    have = models[precision].graphs[name](inputs)[output]
                    squares += np.square(have - want).sum(), np.square(want).sum()
                    cosines.append(np.vdot(have, want) / np.linalg.norm(have) / np.linalg.norm(want))
                errors.append(f" {np.sqrt(squares[0] / squares[1]):.4f} |")
            lines.append(f"| {precision} | {name} | {size} | {min(cosines):.5f} |" + "".join(errors))
    return lines


def layers_table(bundles: dict[str, Bundle]) -> list[str]:
    """The layers that change a graph's result most, alone."""
    lines = []
    for name in GRAPHS:
        known = read_calibration(bundles[CALIBRATED[-1]].folder / FILE).sensitivity
        tables = {precision: known[precision][name] for precision in CALIBRATED}
        ranked = sorted({layer for table in tables.values() for layer in table.layers}, reverse=True,
                        key=lambda layer: max(table.layers.get(layer, 0.0) for table in tables.values()))  # fmt: skip
        lines += [f"| {name}, relative L2 | {' | '.join(CALIBRATED)} |", "|---|" + "---|" * len(CALIBRATED)]
        cells = [("all", *(table.everything for table in tables.values()))]
        cells += [(layer, *(table.layers.get(layer) for table in tables.values())) for layer in ranked[:SHOWN_LAYERS]]
        rest = [
            [table.layers[layer] for layer in ranked[SHOWN_LAYERS:] if layer in table.layers]
            for table in tables.values()
        ]
        if len(ranked) > SHOWN_LAYERS:
            medians = (float(np.median(values)) for values in rest)
            cells.append((f"the other {len(ranked) - SHOWN_LAYERS}: median", *medians))
        lines += [
            "| " + " | ".join("–" if c is None else c if isinstance(c, str) else f"{c:.4f}" for c in row) + " |"
            for row in cells
        ]
        kept = "; ".join(f"{precision}: {', '.join(table.kept) or 'none'}" for precision, table in tables.items())
        lines += ["", f"Kept (in fp8 of nvfp4, in bf16 of the others): {kept}.", ""]
    return lines


def around(page: Path) -> tuple[str, str]:
    """What stands before and after the tables of a page. Raises click.UsageError for a page without their marks."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise click.UsageError(f"{page} has no lines {BEGIN} and {END}, between which the tables would go.")
    return before, after


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where the bundles are, or shall be kept.")
@click.option("--write", type=click.Path(path_type=Path, exists=True), help="The page to put the tables into.")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1, 8), help="Videos per row.")
@click.option("--model", default="tiny", show_default=True, type=click.Choice(list(STEPS)), help="Which of ours.")
@click.option("--checkpoint", type=click.Path(path_type=Path, exists=True), help="Its folder, if it is not built in.")
def main(folder: Path | None, write: Path | None, prompts: int, model: str, checkpoint: Path | None) -> None:
    """Measures a small model of ours in every precision."""
    if write:
        around(write)  # refused before the work, not after it
    from tmd_runtime.pipeline import load

    with tempfile.TemporaryDirectory() as temporary, ExitStack() as opened:
        bundles, counts = export(folder or Path(temporary), model, checkpoint), STEPS[model]
        pipeline = opened.enter_context(load(bundles["fp32"].folder))
        models = {precision: Model(bundle, opened) for precision, bundle in bundles.items()}
        embeds = [pipeline.encode(prompt) for prompt in default_prompts(True)[:prompts]]
        held_out = [pipeline.encode(prompt) for prompt in default_prompts(True, held_out=True)]
        libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnxruntime", "numpy"))
        known = bundles["fp32"].manifest.provenance.source_sha256
        source, weights = ("Built-in model", "student.safetensors") if model == "tiny" else (model, "tim.safetensors")
        lines = [
            f"{source}, {weights} {known[weights][:12]}; {libraries}, Python {platform.python_version()}, "
            f"{platform.machine()}.",
            "",
            *graphs_table(bundles, models, held_out, counts),
            "",
            f"{len(embeds)} {'videos' if model == 'tiny' else 'pictures'}, against fp32:",
            "",
            *frames_table(models, pipeline, embeds, counts),
            "",
            *layers_table(bundles),
        ]
    text = "\n".join(lines).strip() + "\n"
    click.echo(text)
    if write:
        before, after = around(write)
        write.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
