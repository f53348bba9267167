"""An engine that nobody in this project wrote: ONNX's own reference evaluator, behind the interface of all engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from tmd_engines import Bundle, Engine
from tmd_engines.device.buffers import check_buffers, empty_array


class ReferenceEngine(Engine):
    """Runs a graph node by node in numpy. Slow, and independent of every other engine."""

    precisions = ("fp32",)
    storages = (None, "fp32")
    package, install = "onnx", "pip install onnx"

    def __init__(self, bundle: Bundle, graph: str, device: str, threads: int | None) -> None:
        info = bundle.graph_info(graph)
        super().__init__(graph, info.inputs, info.outputs)
        self._evaluator = ReferenceEvaluator(onnx.load(bundle.graph_path(graph)))

    @classmethod
    def prefers(cls, info: Any, size: int) -> bool:
        return False

    @classmethod
    def note(cls) -> str:
        return "to compare with"

    def empty(self, name: str, **dims: int) -> np.ndarray:
        return empty_array(self, name, dims)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        check_buffers(self, inputs, outputs)
        given, made = dict(inputs), dict(outputs)

        def step() -> None:
            for name, value in zip(self.outputs, self._evaluator.run(list(self.outputs), given), strict=True):
                made[name][...] = value

        return step

    def close(self) -> None:
        pass
