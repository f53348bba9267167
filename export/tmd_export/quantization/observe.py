"""Float32 graphs that tell how large the activations inside get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tmd_engines import Bundle, Engine, EngineError, Step
from tmd_engines.device.buffers import check_buffers, empty_array

from .layers import find
from .nodes import add
from .sessions import open_session

Arrays = dict[str, np.ndarray]


class Observed(Engine):
    """A graph that remembers the largest absolute value of every activation that can be quantized: `ranges`.

    Its buffers are numpy arrays. `watch`, if there is one, gets the inputs and outputs of every run; both are
    overwritten by later ones.
    """

    def __init__(self, bundle: Bundle, graph: str, products: str) -> None:
        import onnx_ir as ir

        info = bundle.graph_info(graph)
        super().__init__(graph, info.inputs, info.outputs)
        path = bundle.graph_path(graph)
        model = ir.load(path)
        self.watch: Callable[[Arrays, Arrays], object] | None = None
        self.ranges: dict[str, float] = {}
        self._names: list[tuple[str, str]] = []  # range, output that has it
        for layer in find(model, products):
            for name, value in layer.operands.items():
                size = add("Abs", [value], f"{name}.abs", layer.node)
                largest = add("ReduceMax", [size], f"{name}.max", layer.node, keepdims=0)
                largest.type, largest.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
                model.graph.outputs.append(largest)
                self._names.append((name, f"{name}.max"))
        self._session: Any = open_session(model, path.parent)

    def empty(self, name: str, **dims: int) -> np.ndarray:
        """See `Engine.empty`."""
        return empty_array(self, name, dims)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Step:
        """See `Engine.bind`."""
        check_buffers(self, inputs, outputs)
        given, results = dict(inputs), dict(outputs)

        def step() -> None:
            for name, value in self(given).items():
                results[name][...] = value
            if self.watch is not None:
                self.watch(given, results)

        return step

    def close(self) -> None:
        """See `Engine.close`."""
        self._session = None

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The graph's own outputs."""
        if self._session is None:
            raise EngineError(f"The engine of graph {self.graph} is closed: load the graph again.")
        wanted = [*self.outputs, *(output for _, output in self._names)]
        found = self._session.run(wanted, dict(inputs))
        for (name, _), value in zip(self._names, found[len(self.outputs) :], strict=True):
            self.ranges[name] = max(self.ranges.get(name, 0.0), float(value))
        return dict(zip(self.outputs, found, strict=False))
