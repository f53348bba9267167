"""An engine against ONNX Runtime in float32, graph by graph on seeded inputs, with a gate for each precision.

The reference computes on the same stored weights, so this measures the engine's arithmetic; what the weights lost when
they were rounded stands in the manifest (`accuracy`), measured at export against the torch model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import numpy as np

from ..bundle.manifest import TensorSpec
from ..bundle.reader import Bundle
from ..engine import Engine
from ..errors import EngineError, one_line
from ..registry import ENGINES, check_engine, choose, engine_class, load

MAX_ERROR_FP32 = 1e-4  # in units of the output's RMS where that is above 1, otherwise absolute
MIN_COSINE = {"fp16": 0.9999, "bf16": 0.9999, "int8": 0.99, "fp8": 0.99, "nvfp4": 0.99}
MAX_LEVELS = 1  # of 255: frames that were rounded from values next to a half

_LATENT_CELLS = {"frames": 3, "height": 4, "width": 6}  # in patches: small, and no two alike
_IDS = 32  # every vocabulary has these


@dataclass(frozen=True)
class GraphCheck:
    """One graph's result. Errors are those of the worst output; None: there was nothing to measure.

    `max_abs_error` and `cosine` are over the float outputs, `max_levels` over the uint8 ones. `problem` says why the
    graph did not pass; None: it passed.
    """

    graph: str
    precision: str
    engine: str
    max_abs_error: float | None = None
    cosine: float | None = None
    max_levels: int | None = None
    problem: str | None = None


def verify(bundle: Bundle, engine: str = "auto", threads: int | None = None, seed: int = 0) -> Iterator[GraphCheck]:
    """Checks every graph of the bundle in turn, small sizes, batch 1.

    A graph that the engine cannot load or run has failed. Raises EngineError for an unknown engine, for one that is not
    installed, which says nothing of the bundle, or when the reference itself cannot run.
    """
    check_engine(engine)
    if engine != "auto":
        _check_installed(engine)
    for name, info in bundle.manifest.graphs.items():
        chosen, device = choose(bundle, name, engine)
        with load(bundle, name, "onnxruntime", "cpu", threads=threads) as reference:
            inputs = _inputs(bundle, reference, seed)
            dims = _dims(bundle)
            expected = {output: reference.empty(output, **dims) for output in reference.outputs}
            reference.run(inputs, expected)
        try:
            with load(bundle, name, chosen, device, threads=threads) as loaded:
                found = {output: loaded.empty(output, **dims) for output in loaded.outputs}
                loaded.run(inputs, found)
        except EngineError as error:
            yield GraphCheck(name, info.precision, chosen, problem=one_line(error))
            continue
        yield _compare(GraphCheck(name, info.precision, chosen), expected, found)


def _check_installed(engine: str) -> None:
    """Raises EngineError if an engine's package cannot be imported."""
    found = engine_class(engine, next(iter(ENGINES[engine])))
    try:
        import_module(found.package)
    except Exception as error:  # a broken installation may raise anything
        raise EngineError(
            f"The engine {engine} cannot be imported ({one_line(error)}), so nothing was compared. Install it: "
            f"{found.install}"
        ) from None


def _compare(check: GraphCheck, expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> GraphCheck:
    """`check` with its figures and the first gate that they miss."""
    errors: list[float] = []
    cosines: list[float] = []
    levels: list[int] = []
    problems: list[str] = []
    for name, wanted in expected.items():
        have, want = found[name].astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        if not (np.isfinite(have).all() and np.isfinite(want).all()):
            problems.append(f"{name} has NaN or Inf")
            continue
        error = float(np.abs(have - want).max())
        cosine = _cosine(have, want)
        if wanted.dtype == np.uint8:
            levels.append(int(error))
        else:
            errors.append(error)
            cosines.append(cosine)
        gate = MIN_COSINE.get(check.precision)
        if gate is not None:
            if cosine < gate:
                problems.append(f"the cosine of {name} is {cosine:.6f}, below {gate}")
        elif wanted.dtype == np.uint8:
            if error > MAX_LEVELS:
                problems.append(f"{name} is off by {int(error)} levels, more than {MAX_LEVELS}")
        elif error > MAX_ERROR_FP32 * max(1.0, float(np.sqrt(np.mean(want**2)))):
            problems.append(f"{name} is off by {error:.1e}, more than {MAX_ERROR_FP32:.0e}")
    return GraphCheck(
        check.graph,
        check.precision,
        check.engine,
        max_abs_error=max(errors, default=None),
        cosine=min(cosines, default=None),
        max_levels=max(levels, default=None),
        problem=problems[0] if problems else None,
    )


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else float(np.array_equal(one, other))


def _dims(bundle: Bundle) -> dict[str, int]:
    patch = dict(zip(("frames", "height", "width"), bundle.manifest.model.patch_size, strict=True))
    sizes = {axis: cells * patch[axis] for axis, cells in _LATENT_CELLS.items()}
    of_stills = bundle.manifest.family.makes_stills
    tokens = int(np.prod([cells for axis, cells in _LATENT_CELLS.items() if not (of_stills and axis == "frames")]))
    return {"batch": 1, "text": bundle.manifest.text.max_length, "tokens": tokens, **sizes}


def _inputs(bundle: Bundle, engine: Engine, seed: int) -> dict[str, np.ndarray]:
    """Normal values; times in 0..1 with r below s (or t), a turn by random angles, ids, a mask with padding, and the
    first frame held."""
    rng = np.random.default_rng(seed)
    dims, classes = _dims(bundle), bundle.manifest.family.classes(bundle.manifest.model)
    ids = _IDS if classes is None else classes
    arrays = {name: engine.empty(name, **dims) for name in engine.inputs}
    for name, array in arrays.items():
        array[...] = _values(engine.inputs[name], array.shape, rng, ids)
    if "r" in arrays:
        arrays["r"] *= arrays["s" if "s" in arrays else "t"]
    if "rope_cos" in arrays and "rope_sin" in arrays:
        angle = rng.uniform(0, 2 * np.pi, arrays["rope_cos"].shape)
        arrays["rope_cos"][...], arrays["rope_sin"][...] = np.cos(angle), np.sin(angle)
    return arrays


def _values(spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator, ids: int) -> np.ndarray:
    if spec.name == "attention_mask":
        return np.broadcast_to(np.arange(shape[1]) < max(1, shape[1] // 3), shape)
    if spec.name == "held":
        return np.arange(*shape) == 0
    if np.dtype(spec.dtype).kind != "f":
        return rng.integers(0, ids, shape)
    return rng.uniform(size=shape) if spec.name in ("t", "s", "r") else rng.normal(size=shape)
