"""Buffers for any graph of the synthetic bundle, and what ONNX Runtime makes of the graph as it is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime

from tmd_engines import Bundle, Engine

DIMS = {"batch": 1, "frames": 5, "height": 8, "width": 6, "text": 32, "tokens": 60}
Buffers = dict[str, np.ndarray]


def buffers(engine: Engine, seed: int = 3, **dims: int) -> tuple[Buffers, Buffers]:
    """Inputs with random values and outputs full of nonsense."""
    rng = np.random.default_rng(seed)
    dims = DIMS | dims
    inputs = {name: engine.empty(name, **dims) for name in engine.inputs}
    for array in inputs.values():
        array[...] = rng.normal(size=array.shape) if array.dtype.kind == "f" else rng.integers(0, 2, array.shape)
    outputs = {name: engine.empty(name, **dims) for name in engine.outputs}
    for array in outputs.values():
        array.fill(77)
    return inputs, outputs


def plain_session(bundle: Bundle, graph: str, inputs: Buffers) -> list[Any]:
    """The stored graph as it is, without lowering or binding."""
    session = onnxruntime.InferenceSession(bundle.graph_path(graph), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))
