"""A written graph against the torch module it came from, on ONNX Runtime, at sizes that were not traced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tmd_engines import Bundle
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine

from ..errors import ExportError
from .graph import Graph

MAX_ERROR = 1e-4  # for float outputs of an fp32 graph, times their RMS where that is above 1 (a decoder's caches)
MIN_COSINE = 0.9999  # for all outputs of a graph in low precision
MIN_COSINE_QUANTIZED = 0.99  # and of one with 8 or 4 bits
_INSTEAD = {"int8": "bf16", "fp8": "bf16", "nvfp4": "fp8"}  # precision -> what is closer to fp32; all others: fp32
MAX_LEVELS = 1  # for uint8 frames: a value may round the other way,
MAX_LEVEL_SHARE = 0.005  # but few may

SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 1, "frames": 5, "height": 6, "width": 4, "text": 100},
    {"batch": 3, "frames": 1, "height": 2, "width": 8, "text": 3},
)
"""Sizes to compare at, none of them traced: odd frame counts, not square, short text and text beyond the last distance
bucket. Small, because the largest models must pass through here too, on a CPU.
"""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """Inputs at one size, and what the reference makes of them: `calls` calls, one behind the other along the batch."""

    sizes: Mapping[str, int]
    inputs: Arrays
    expected: Arrays
    calls: int = 1


@dataclass(frozen=True)
class Accuracy:
    """A graph's outputs against the reference's, worst case over sizes.

    `max_abs_error` is that of the float outputs, `cosine` that of all; of `levels_total` uint8 values `levels_changed`
    differ, by `max_levels` at most. `scaled_error` is as `max_abs_error`, of outputs divided by their RMS where that is
    above 1; None: the same. `relative_l2` is that of all float outputs together. `scope`: which part of the graph was
    measured, if it was not all of it.
    """

    max_abs_error: float
    cosine: float
    max_levels: int = 0
    levels_changed: int = 0
    levels_total: int = 0
    scope: str = ""
    scaled_error: float | None = None
    relative_l2: float = 0.0

    def entry(self) -> dict[str, Any]:
        """As the manifest states it."""
        reference = ", ".join(filter(None, ("tmd_ref fp32", self.scope)))
        if self.levels_total:
            reference += f"; {self.levels_changed} of {self.levels_total} uint8 values differ"
            reference += f", by {self.max_levels}" if self.levels_changed else ""
        return {"max_abs_error": self.max_abs_error, "cosine": self.cosine, "reference": reference}


def reference(graph: Graph) -> list[Case]:
    """Runs the torch module, which has its weights, at `SIZES`.

    Raises ExportError if its outputs say nothing, because they are all alike.
    """
    cases = []
    for seed, dims in enumerate(SIZES):
        given = graph.random_inputs(seed + 1, **dims)
        with torch.no_grad():
            results = graph.module(*given.values())
        results = results if isinstance(results, tuple) else (results,)
        expected = {spec.name: value.numpy() for spec, value in zip(graph.outputs, results, strict=True)}
        shown = expected.get("frames", next(iter(expected.values())))
        if not np.isfinite(shown).all() or np.all(shown == shown.flat[0]):
            raise ExportError(
                f"{graph.name}: the reference gives {shown.flat[0]} or NaN everywhere, so nothing can be compared: its "
                "weights are damaged."
            )
        cases.append(Case(graph.sizes(**dims), {name: value.numpy() for name, value in given.items()}, expected))
    return cases


def measure(bundle: Bundle, name: str, cases: list[Case], as_stored: bool = False) -> Accuracy:
    """Runs the graph `name` of `bundle` on ONNX Runtime and compares; the gates are in `check`.

    Where the graph has low precision its values are rounded, although this engine computes in float32. `as_stored`:
    weights are read from the file when they are used, for graphs that nearly fill the memory.
    """
    as_stored = as_stored or bundle.graph_info(name).precision != "fp32"
    worst, scaled, least, max_levels, changed, total = 0.0, 0.0, 1.0, 0, 0, 0
    squares = [0.0, 0.0]  # of differences and of values
    with OnnxRuntimeEngine(bundle, name, "cpu", None, as_stored=as_stored) as engine:
        for case in cases:
            outputs = {output: engine.empty(output, **case.sizes) for output in engine.outputs}
            given = {key: case.inputs[key].astype(spec.dtype, copy=False) for key, spec in engine.inputs.items()}
            engine.run(given, outputs)
            for output, expected in case.expected.items():
                found = outputs[output]
                if found.dtype == np.uint8:
                    levels = np.abs(found.astype(np.int16) - expected)
                    max_levels = max(max_levels, int(levels.max()))
                    changed, total = changed + int(np.count_nonzero(levels)), total + levels.size
                else:
                    error = float(np.abs(found - expected).max())
                    error = math.inf if math.isnan(error) else error
                    worst = max(worst, error)
                    scaled = max(scaled, error / max(1.0, math.sqrt(float(np.square(expected, dtype=float).mean()))))
                    squares[0] += float(np.square(found - expected, dtype=float).sum())
                    squares[1] += float(np.square(expected, dtype=float).sum())
                pairs = zip(np.split(found, case.calls), np.split(expected, case.calls), strict=True)
                least = min(least, *(cosine(one, other) for one, other in pairs))
    precision = bundle.graph_info(name).precision
    scope = "" if precision == "fp32" else f"values rounded to {precision}"
    relative = math.sqrt(squares[0] / squares[1]) if squares[1] else 0.0
    return Accuracy(worst, least, max_levels, changed, total, scope=scope, scaled_error=scaled, relative_l2=relative)


def check(name: str, found: Accuracy, precision: str) -> None:
    """Raises ExportError unless `found` passes the gates for graphs of this precision."""
    problem, exact = None, precision == "fp32"
    least = MIN_COSINE if precision in ("fp16", "bf16") else MIN_COSINE_QUANTIZED
    error = found.max_abs_error if found.scaled_error is None else found.scaled_error
    if not math.isfinite(found.max_abs_error):
        problem = "it gives NaN or Inf"
    elif exact and error > MAX_ERROR:
        problem = f"its outputs are up to {error:.2g} off, more than {MAX_ERROR:g}"
    elif not exact and found.cosine < least:
        problem = f"in {precision} the cosine is {found.cosine:.6f}, below {least}"
    elif exact and found.max_levels > MAX_LEVELS:
        problem = f"its frames are up to {found.max_levels} levels of 255 off, more than {MAX_LEVELS}"
    elif exact and found.levels_changed > MAX_LEVEL_SHARE * found.levels_total:
        problem = f"{found.levels_changed} of {found.levels_total} values of its frames are a level off"
    if problem:
        instead = _INSTEAD.get(precision, "fp32")
        part = name.removesuffix("_first").removesuffix("_step")  # decoders pass caches: one precision for both
        remedy = "Use the versions in constraints.txt." if exact else f"Choose --precision {part}={instead}."
        raise ExportError(f"{name} on ONNX Runtime differs from the reference: {problem}. {remedy}")


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """Of all values, as one vector. Of two that are nothing but zeros it is 1."""
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(not a.any() and not b.any())
