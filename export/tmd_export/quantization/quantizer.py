"""Quantization as an export uses it: calibrate once, quantize each graph, compare it with float32 on real inputs."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines import Bundle, TensorSpec
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine

from ..errors import ExportError
from ..families import FAMILIES, built_in
from ..graph_export import Tell, export_graph, unfinished
from ..graphs import accuracy
from ..parts import UPDATE
from ..sources.source import Source
from ..weights.weights import Weights
from .calibration import FILE, FORMAT, QUANTIZABLE, Calibration, Sensitivity, check_identity, identity
from .contributions import Contributions
from .formats import FORMATS
from .observe import Arrays, Observed
from .passes import Pass, stacked
from .prompts import default_prompts
from .qdq import quantize
from .rounded import Rounded
from .samplings import Condition, Samplings, few
from .sensitivity import measure
from .weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

LARGE_BYTES = 1 << 30  # of a graph's weights in float32; above it, few passes are run, and a table only if it is needed
KEPT_STEPS = 8  # of a long sampling, about so many passes are kept to compare with
SCRATCH = "float32"
SEED, HELD_OUT_SEED = 0, 1 << 31  # the first of the noise to calibrate on, and of the noise to compare on


class Quantizer:
    """The calibration of one export. `prepare` before the first use of anything else."""

    def __init__(
        self,
        source: Source,
        document: dict[str, Any],
        precisions: Mapping[str, str],
        folder: Path,
        given: Calibration | Sequence[str] | None,
        verify: bool,
        keep_layers: bool = True,
    ) -> None:
        """`precisions`: graph -> precision of what is exported. `document`: the manifest in the making, in `folder`.
        `given`: a calibration to use, prompts to calibrate on, or None for the built-in ones. `keep_layers`: measure
        which layers must stay in high precision, where that is not known.

        Raises ExportError if the calibration is another checkpoint's, or if there is no text encoder to calibrate with.
        """
        self._source, self._document, self._folder, self._verify = source, document, folder, verify
        self._keep_layers, self._family = keep_layers, FAMILIES[source.family]
        self._precisions = {part: each for part, each in precisions.items() if each in FORMATS and part in QUANTIZABLE}
        self._identity = identity(source)
        self._given = given if isinstance(given, Calibration) else None
        self._built_in_prompts = given is None or isinstance(given, Calibration)
        own = default_prompts(source.model in built_in())
        self._prompts = own if given is None or isinstance(given, Calibration) else tuple(given)
        if self._given:
            check_identity(self._given, self._identity, "the calibration")
        self._encodes = "text_encoder" in precisions and source.tokenizer is not None
        reads = source.trained and document["model"].get("classes") is None
        if self.runs_float32 and reads and not self._encodes:
            raise ExportError(
                f"{', '.join(dict.fromkeys(self._precisions.values()))} is calibrated on prompts, and text_encoder is "
                "not among the parts: add it, or give --calibration FILE.json of an earlier export and --no-verify."
            )
        self.calibration: Calibration | None = None
        self._large, self._usual_steps = False, 0
        self._passes: dict[str, dict[int, list[Pass]]] = {}  # graph -> steps -> passes on prompts held out

    @property
    def runs_float32(self) -> bool:
        """Whether the two graphs are needed in float32: to calibrate, to measure layers, or to compare with."""
        known = self._given.sensitivity if self._given else {}
        missing = any(part not in known.get(precision, {}) for part, precision in self._precisions.items())
        return self._given is None or self._verify or missing

    def prepare(self, tell: Tell) -> None:
        """Calibrates, if that has not been done. Raises ExportError."""
        if self.calibration is not None:
            return
        if not self.runs_float32:
            self.calibration = self._given
            return
        scratch = self._folder / SCRATCH
        scratch.mkdir()
        try:
            bundle = self._in_float32(scratch, tell)
            self._large = any(_weight_bytes(bundle, part) > LARGE_BYTES for part in QUANTIZABLE)
            with ExitStack() as opened:
                graphs = {part: Observed(bundle, part, self._family.products) for part in QUANTIZABLE}
                for graph in graphs.values():
                    opened.callback(graph.close)
                update = opened.enter_context(OnnxRuntimeEngine(bundle, UPDATE, "cpu", None))
                samplings = Samplings(bundle.manifest, self._family, {**graphs, UPDATE: update})
                found = self._given or self._calibrate(samplings, graphs, tell)
                self._hold_out(samplings, graphs)
            sensitivity = {precision: dict(known) for precision, known in found.sensitivity.items()}
            for part, precision in self._precisions.items():
                if part not in sensitivity.setdefault(precision, {}):
                    sensitivity[precision][part] = self._measure_layers(bundle, part, precision, found, tell)
            self.calibration = found.model_copy(update={"sensitivity": sensitivity})
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def quantize(self, model: ir.Model, weights: Weights, part: str) -> QuantizedWeights:
        """Quantizes the traced graph `part` in place; returns what to write as its weights. Raises ExportError."""
        calibration, precision = self._prepared(), self._precisions[part]
        kept = frozenset(calibration.sensitivity[precision][part].kept)
        return quantize(model, weights, precision, calibration.ranges.get(part, {}), self._family.products, kept)

    def measure(self, bundle: Bundle, part: str) -> accuracy.Accuracy:
        """The written graph `part` against float32, on every pass of samplings of prompts held out, worst case."""
        found = []
        info = bundle.graph_info(part)
        for steps, passes in self._passes[part].items():
            cases = [
                accuracy.Case(_sizes(info.inputs, given), given, expected, calls)
                for given, expected, calls in stacked(info.inputs, info.outputs, passes)
            ]
            found.append((steps, len(passes), accuracy.measure(bundle, part, cases, as_stored=True)))
        by_steps = ", ".join(f"{steps}: {each.relative_l2:.4f}" for steps, _, each in found)
        total = sum(count for _, count, _ in found)
        worst = min((each for *_, each in found), key=lambda each: each.cosine)
        return replace(
            worst,
            max_abs_error=max(each.max_abs_error for *_, each in found),
            relative_l2=max(each.relative_l2 for *_, each in found),
            scope=f"{worst.scope}, on {total} passes of samplings; relative L2 by number of steps: {by_steps}",
        )

    def write(self) -> None:
        """Leaves the calibration in the bundle."""
        (self._folder / FILE).write_text(self._prepared().model_dump_json(indent=1) + "\n", encoding="utf-8")

    def _prepared(self) -> Calibration:
        if self.calibration is None:
            raise RuntimeError("prepare() comes first")
        return self.calibration

    def _in_float32(self, scratch: Path, tell: Tell) -> Bundle:
        """The graphs of a sampling in float32, in the folder `scratch`."""
        document = {**self._document, "graphs": {}}
        for part in (*QUANTIZABLE, UPDATE):
            export_graph(self._source, part, "fp32", scratch, document, self._verify, lambda *_: tell("calibrate"))
        return unfinished(scratch, document, document["graphs"])

    def _conditions(self, samplings: Samplings, prompts: Sequence[str], seed: int) -> list[Condition]:
        if not self._encodes:
            return samplings.conditions(prompts, None, seed)
        entry = self._document["graphs"]["text_encoder"]
        return samplings.conditions(prompts, unfinished(self._folder, self._document, {"text_encoder": entry}), seed)

    def _calibrate(self, samplings: Samplings, graphs: Mapping[str, Observed], tell: Tell) -> Calibration:
        """Ranges over whole samplings of the prompts, with every number of outer and inner steps."""
        tell("calibrate")
        family = self._family
        for part, graph in graphs.items():

            def more(inputs: Arrays, _: Arrays, part: str = part, graph: Observed = graph) -> None:
                for others in family.beside(part, inputs):
                    graph(others)

            graph.watch = more
        counts = few(samplings.counts) if self._large else samplings.counts
        prompts = self._prompts[: len(counts)] if self._large and self._built_in_prompts else self._prompts
        conditions = self._conditions(samplings, prompts, SEED)
        runs = _in_turn(conditions, counts) if self._large else list(itertools.product(conditions, counts))
        for done, (condition, count) in enumerate(runs):
            tell("calibrate", done, len(runs))
            samplings.run(condition, SEED + done, *count)
        return Calibration(
            format=FORMAT,
            checkpoint=self._identity,
            prompts=prompts if self._encodes else (),
            latents=samplings.latents,
            steps=tuple(counts),
            ranges={part: dict(graph.ranges) for part, graph in graphs.items()},
            sensitivity={},
        )

    def _hold_out(self, samplings: Samplings, graphs: Mapping[str, Observed]) -> None:
        """Keeps passes of samplings of other prompts from other noise, with every number of steps and the default inner
        one; of a large model with the fewest steps and its default ones, each on a prompt of its own."""
        conditions = self._conditions(
            samplings, default_prompts(self._source.model in built_in(), held_out=True), HELD_OUT_SEED
        )
        known, inner = sorted({steps for steps, _ in samplings.counts}), samplings.default_steps[1]
        self._usual_steps = samplings.usual_steps
        if self._large:
            known = sorted({known[0], self._usual_steps})
            runs = list(zip(range(len(known)), itertools.cycle(conditions), known, strict=False))
        else:
            runs = [(number, each, steps) for steps in known for number, each in enumerate(conditions)]
        self._passes = {part: {steps: [] for steps in known} for part in QUANTIZABLE}
        for number, condition, steps in runs:
            for part, graph in graphs.items():
                graph.watch = self._keeper(graph, self._passes[part][steps], steps)
            samplings.run(condition, HELD_OUT_SEED + number, steps, inner)

    def _keeper(self, graph: Observed, passes: list[Pass], steps: int) -> Callable[[Arrays, Arrays], None]:
        """Adds what a graph is compared on to `passes`."""
        family, numbers = self._family, itertools.count()

        def keep(inputs: Arrays, outputs: Arrays) -> None:
            if next(numbers) % max(1, steps // KEPT_STEPS):
                return
            for given in (inputs, *family.beside(graph.graph, inputs)):
                compared = family.compared(graph.graph, given)
                found = outputs if compared is inputs else graph(compared)
                passes.append(Pass(_copied(compared), _copied(found)))

        return keep

    def _measure_layers(
        self, bundle: Bundle, part: str, precision: str, calibration: Calibration, tell: Tell
    ) -> Sensitivity:
        tell("calibrate")
        info = bundle.graph_info(part)
        rounded = Rounded(bundle.graph_path(part), precision, calibration.ranges[part], self._family.products)
        by_steps = {steps: stacked(info.inputs, info.outputs, each) for steps, each in self._passes[part].items()}
        passes = by_steps.pop(self._usual_steps)
        others = [] if self._large else [each for group in by_steps.values() for each in group]
        compared = [(given, expected) for given, expected, _ in passes]
        table = (lambda: Contributions(rounded)(compared)) if self._keep_layers else None
        try:
            return measure(rounded, passes, table, not self._large, goal=FORMATS[precision].budget, others=others)
        finally:
            rounded.close()


def _in_turn(
    conditions: Sequence[Condition], counts: Sequence[tuple[int, int]]
) -> list[tuple[Condition, tuple[int, int]]]:
    """Every condition and every count at least once, and not each with each."""
    most = max(len(conditions), len(counts))
    return [(conditions[k % len(conditions)], counts[k % len(counts)]) for k in range(most)]


def _weight_bytes(bundle: Bundle, part: str) -> int:
    path = bundle.graph_path(part)
    data = path.with_name(f"{path.name}.data")
    return data.stat().st_size if data.exists() else 0


def _copied(arrays: Arrays) -> Arrays:
    return {name: np.array(value) for name, value in arrays.items()}


def _sizes(specs: tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The sizes that the inputs of a graph have, by symbol."""
    return {
        symbol: size // factor
        for spec in specs
        for (factor, symbol), size in zip(spec.factors(), inputs[spec.name].shape, strict=True)
        if symbol
    }
