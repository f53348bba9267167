"""Quantization as an export uses it: calibrate once, quantize each graph, compare it with float32 on real inputs."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines import Bundle, TensorSpec

from ..errors import ExportError
from ..families import FAMILIES, built_in
from ..graph_export import export_graph, unfinished
from ..graphs import accuracy
from ..sources.source import Source
from ..weights.weights import Weights
from .calibration import FILE, QUANTIZABLE, Calibration, Sensitivity, check_identity, identity
from .embeds import embed_prompts
from .formats import FORMATS
from .inputs import latent_size, rope, unread
from .observe import Arrays, Observed, Switched
from .prompts import default_prompts
from .qdq import quantize
from .rollout import rollout, step_counts
from .sensitivity import measure
from .weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH = 8  # prompts at a time
MAX_TABLE_BYTES = 1 << 30  # of weights in float32; above it, layers are measured one by one only if some must be kept
KEPT_STEPS = 8  # of a long sampling, about so many passes are kept to compare with
SCRATCH = "float32"

Tell = Callable[..., None]
Pass = tuple[Arrays, Arrays]


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
        self._keep_layers, self._products = keep_layers, FAMILIES[source.family].products
        self._precisions = {part: said for part, said in precisions.items() if said in FORMATS and part in QUANTIZABLE}
        self._identity = identity(source)
        self._given = given if isinstance(given, Calibration) else None
        told = None if isinstance(given, Calibration) else given
        self._prompts = default_prompts(source.model in built_in()) if told is None else tuple(told)
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
        self._passes: dict[str, dict[int, list[Pass]]] = {}  # graph -> steps -> passes on prompts held out

    @property
    def runs_float32(self) -> bool:
        """Whether the two graphs are needed in float32: to calibrate, to measure layers, or to compare with."""
        known = self._given.sensitivity if self._given else {}
        missing = any(part not in known.get(said, {}) for part, said in self._precisions.items())
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
            document = {**self._document, "graphs": {}}
            for part in QUANTIZABLE:
                export_graph(self._source, part, "fp32", scratch, document, self._verify, lambda *_: tell("calibrate"))
            graphs = {part: Observed(scratch / f"{part}.onnx", self._products) for part in QUANTIZABLE}
            found = self._given or self._calibrate(graphs, tell)
            self._hold_out(graphs)
            del graphs
            sensitivity = {said: dict(known) for said, known in found.sensitivity.items()}
            for part, said in self._precisions.items():
                if part not in sensitivity.setdefault(said, {}):
                    sensitivity[said][part] = self._measure_layers(scratch, part, said, found.ranges[part], tell)
            self.calibration = found.model_copy(update={"sensitivity": sensitivity})
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def quantize(self, model: ir.Model, weights: Weights, part: str) -> QuantizedWeights:
        """Quantizes the traced graph `part` in place; returns what to write as its weights. Raises ExportError."""
        calibration, precision = self._prepared(), self._precisions[part]
        kept = frozenset(calibration.sensitivity[precision][part].kept)
        return quantize(model, weights, precision, calibration.ranges.get(part, {}), self._products, kept)

    def measure(self, bundle: Bundle, part: str) -> accuracy.Accuracy:
        """The written graph `part` against float32, on every pass of samplings of prompts held out, worst case."""
        found = []
        specs = bundle.graph_info(part).inputs
        for steps, passes in self._passes[part].items():
            cases = [accuracy.Case(_sizes(specs, given), given, expected) for given, expected in passes]
            found.append((steps, len(cases), accuracy.measure(bundle, part, cases, as_stored=True)))
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

    def _calibrate(self, graphs: Mapping[str, Observed], tell: Tell) -> Calibration:
        """Ranges over whole samplings of the prompts, with every number of outer and inner steps."""
        tell("calibrate")
        rng = np.random.default_rng(0)
        embeds, negative = self._embeds(self._prompts, rng)
        counts = step_counts(self._document["sampler"])
        starts = range(0, len(embeds), BATCH)
        for done, (start, (steps, inner)) in enumerate((start, count) for start in starts for count in counts):
            tell("calibrate", done, len(starts) * len(counts))
            rows = slice(start, start + BATCH)
            self._sample(graphs["backbone"], graphs["flow_head"], rng, embeds[rows], negative, steps, inner)
        return Calibration(
            format="tmd-calibration-1",
            checkpoint=self._identity,
            prompts=self._prompts if self._encodes else (),
            latents=latent_size(self._document),
            steps=tuple(counts),
            ranges={part: graph.ranges for part, graph in graphs.items()},
            sensitivity={},
        )

    def _hold_out(self, graphs: Mapping[str, Observed]) -> None:
        """Records samplings of other prompts from other noise, with every number of steps and the default inner one."""
        sampler = self._document["sampler"]
        rng = np.random.default_rng(1)
        embeds, negative = self._embeds(default_prompts(self._source.model in built_in(), held_out=True), rng)
        inner = sampler.get("inner_steps", 1)
        self._passes = {part: {} for part in QUANTIZABLE}
        for steps in sorted({steps for steps, _ in step_counts(sampler)}):

            def recorded(part: str, steps: int = steps) -> Callable[[Mapping[str, np.ndarray]], Arrays]:
                passes = self._passes[part].setdefault(steps, [])
                numbers = itertools.count()

                def run(inputs: Mapping[str, np.ndarray]) -> Arrays:
                    outputs = graphs[part](inputs)
                    if next(numbers) % max(1, steps // KEPT_STEPS) == 0:
                        passes.append((dict(inputs), outputs))
                    return outputs

                return run

            self._sample(recorded("backbone"), recorded("flow_head"), rng, embeds, negative, steps, inner)

    def _measure_layers(
        self, scratch: Path, part: str, precision: str, ranges: Mapping[str, float], tell: Tell
    ) -> Sensitivity:
        switched = Switched(scratch / f"{part}.onnx", precision, ranges, self._products)
        small = (scratch / f"{part}.onnx.data").stat().st_size <= MAX_TABLE_BYTES
        passes = self._passes[part][self._document["sampler"]["steps"]]
        each = small if self._keep_layers else None
        return measure(switched, switched.layers, passes, each, lambda *done: tell("calibrate", *done))

    def _sample(
        self,
        backbone: Any,
        flow_head: Any,
        rng: np.random.Generator,
        embeds: np.ndarray,
        negative: np.ndarray,
        *steps: int,
    ) -> None:
        size = latent_size(self._document)
        noise = rng.standard_normal((len(embeds), self._document["latents"]["channels"], *size), np.float32)
        negative, tables = np.broadcast_to(negative, embeds.shape), rope(self._document, size)
        rollout(backbone, flow_head, self._document["sampler"], rng, noise, embeds, negative, tables, *steps)

    def _embeds(self, prompts: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Features of prompts and of the negative one, or what takes their place."""
        if not self._encodes or self._source.tokenizer is None:
            embeds = unread(self._document, len(prompts), rng)
        else:
            entry = self._document["graphs"]["text_encoder"]
            bundle = unfinished(self._folder, self._document, "text_encoder", entry)
            negative = self._document["sampler"].get("negative_prompt") or ""
            null_embeds = self._source.null_embeds()
            null = None if null_embeds is None else null_embeds.numpy()
            embeds = embed_prompts(bundle, self._source.tokenizer, [*prompts, negative], null)
        return embeds[:-1], embeds[-1:]


def _sizes(specs: tuple[TensorSpec, ...], inputs: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The sizes that the inputs of a graph have, by symbol."""
    return {
        symbol: size // factor
        for spec in specs
        for (factor, symbol), size in zip(spec.factors(), inputs[spec.name].shape, strict=True)
        if symbol
    }
