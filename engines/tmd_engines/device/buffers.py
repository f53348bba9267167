"""Numpy arrays as the buffers of an engine on the CPU: made to fit a graph, checked before their address is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..bundle.manifest import GraphInfo, TensorSpec
from ..engine import Engine
from ..errors import EngineError, quote


def check_cpu_graph(engine: str, device: str, graph: str, info: GraphInfo, precisions: tuple[str, ...]) -> None:
    """Raises EngineError unless `engine` can run such a graph on this device with numpy arrays as buffers."""
    if device != "cpu":
        raise EngineError(f"The engine {engine} runs on device cpu, not on {quote(device)}, in this version of tmd.")
    check_graph_types(engine, graph, info, precisions)


def check_graph_types(engine: str, graph: str, info: GraphInfo, precisions: tuple[str, ...]) -> None:
    """Raises EngineError unless `engine` computes graphs of this precision, with buffers of types that numpy has."""
    if info.precision not in precisions:
        raise EngineError(
            f"Graph {graph} is {info.precision}, and the engine {engine} computes {', '.join(precisions)} in this "
            "version of tmd: use such a bundle."
        )
    if any(spec.dtype == "bfloat16" for spec in (*info.inputs, *info.outputs)):
        raise EngineError(
            f"Graph {graph} has bfloat16 inputs or outputs, which numpy has not: export it again with this version."
        )


def empty_array(engine: Engine, name: str, dims: Mapping[str, int]) -> np.ndarray:
    """Uninitialised C-contiguous array for the input or output `name`; see `Engine.empty`. Raises EngineError."""
    shape = engine.shape(name, **dims)
    return np.empty(shape, np.dtype((engine.inputs.get(name) or engine.outputs[name]).dtype))


def check_buffers(engine: Engine, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Raises EngineError unless the arrays are what `Engine.bind` asks for, named, typed, sized and apart.

    They are numpy arrays or, where the engine makes such, `DeviceArray`s.
    """
    sizes: dict[str, tuple[int, str]] = {}  # symbol -> its value, and the tensor that set it
    for kind, buffers, specs in (("input", inputs, engine.inputs), ("output", outputs, engine.outputs)):
        wrong = [f"misses the {kind} {name}" for name in specs if name not in buffers]
        wrong += [f"has no {kind} {quote(name)}" for name in buffers if name not in specs]
        if wrong:
            raise EngineError(f"Graph {engine.graph} {wrong[0]}: bind every {kind}, and nothing else, by its name.")
        for name, array in buffers.items():
            problem = _buffer_problem(array, specs[name], kind, engine) or _size_problem(array, specs[name], sizes)
            if problem:
                raise EngineError(f"The {kind} {name} of graph {engine.graph} {problem}.")
    for name, other in _overlaps(inputs, outputs):
        raise EngineError(
            f"The output {name} of graph {engine.graph} shares memory with {other}, and it is written while that is "
            "still in use: give it a buffer of its own."
        )


def _buffer_problem(array: Any, spec: TensorSpec, kind: str, engine: Engine) -> str | None:
    on_device = engine.buffer_type is not None and isinstance(array, engine.buffer_type)
    if not on_device and not isinstance(array, np.ndarray):
        return f"is a {type(array).__name__}: give a numpy array, for example from engine.empty"
    if array.dtype != np.dtype(spec.dtype):
        return f"has dtype {array.dtype}, and the graph needs {spec.dtype}: convert it, or use engine.empty"
    if on_device:
        return None
    if not (array.flags.c_contiguous and array.flags.aligned):
        return "is not C-contiguous and aligned, and an engine reads plain memory: pass a copy of it"
    if kind == "output" and not array.flags.writeable:
        return "is read-only: give a writable array"
    return None


def _size_problem(array: Any, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> str | None:
    """Compares the shape with the spec, and every symbol with what an earlier tensor made of it."""
    wanted = f"has shape {list(array.shape)}, and the graph needs [{', '.join(map(str, spec.shape))}]"
    if array.ndim != len(spec.shape):
        return wanted
    for size, (factor, symbol) in zip(array.shape, spec.factors(), strict=True):
        if symbol is None:
            if size != factor:
                return wanted
        elif size < 1 or size % factor:
            return wanted
        else:
            known, owner = sizes.setdefault(symbol, (size // factor, spec.name))
            if known != size // factor:
                return f"{wanted}, where {symbol} is {known} by the shape of {owner}"
    return None


def _overlaps(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(output, other tensor) that share memory. Arrays are contiguous, so each is one interval of addresses."""
    spans = sorted(
        (start := _address(array), start + array.nbytes, is_output, name)
        for is_output, buffers in ((False, inputs), (True, outputs))
        for name, array in buffers.items()
    )
    furthest: dict[bool, tuple[int, str]] = {False: (0, ""), True: (0, "")}  # end and name of the longest span so far
    for start, end, is_output, name in spans:
        for other_is_output, (other_end, other) in furthest.items():
            if start < other_end and (is_output or other_is_output):
                yield (name, other) if is_output else (other, name)
        furthest[is_output] = max(furthest[is_output], (end, name))


def _address(array: Any) -> int:
    return int(array.ctypes.data if isinstance(array, np.ndarray) else array.address)
