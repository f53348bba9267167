"""Float32 graphs that tell what happens inside: how large activations get, and what the rounding of a layer does.

Both are sessions of ONNX Runtime on the graph's own data file, from which weights are read when they are used, so that
the memory that this takes does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines import Bundle, Engine, EngineError, Step
from tmd_engines.device.buffers import check_buffers, empty_array
from tmd_engines.onnxruntime.lowering import attention_to_multi_head_attention

from .formats import FORMATS
from .layers import find
from .qdq import add, constant, rewrite

if TYPE_CHECKING:
    import onnx_ir as ir

Arrays = dict[str, np.ndarray]
_LEAST_SCALE = 1e-12  # of a weight whose column is zero


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
        self._session = _session(model, path.parent)

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


class Switched:
    """A graph of which every layer in `layers` can be computed as it is or as it would be in `precision`."""

    def __init__(self, path: Path, precision: str, ranges: Mapping[str, float], products: str) -> None:
        import onnx_ir as ir

        model = ir.load(path)
        self._outputs = [value.name or "" for value in model.graph.outputs]
        found = find(model, products, FORMATS[precision].attention)
        self.layers = [layer.name for layer in found]
        rewrite(model.graph, found, ranges, _Switches(model.graph, self.layers, precision))
        self._session = _session(model, path.parent)

    def __call__(self, inputs: Mapping[str, np.ndarray], layers: Collection[str]) -> Arrays:
        """The graph's outputs with `layers` quantized and no others."""
        switches = {_switch(name): np.array(name in layers) for name in self.layers}
        return dict(zip(self._outputs, self._session.run(self._outputs, {**inputs, **switches}), strict=True))


class _Switches:
    """Rounds in float32, and only where the layer's switch, an input of the graph, is on."""

    def __init__(self, graph: ir.Graph, layers: list[str], precision: str) -> None:
        import onnx_ir as ir

        self.format, self._graph = FORMATS[precision], graph
        self._type = int(ir.DataType[self.format.onnx])
        self._switches = {
            name: ir.Value(name=_switch(name), shape=ir.Shape(()), type=ir.TensorType(ir.DataType.BOOL))
            for name in layers
        }
        graph.inputs.extend(self._switches.values())

    def activation(self, value: ir.Value, name: str, largest: float, before: ir.Node) -> ir.Value:
        scale = constant(self._graph, f"{name}.scale", np.asarray(largest / self.format.largest or 1.0, np.float32))
        return self._rounded(value, scale, name, before)

    def weight(self, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
        size = add("Abs", [value], f"{name}.weight.abs", before)
        axes = constant(self._graph, "switches.rows", np.array([0]))
        largest = add("ReduceMax", [size, axes], f"{name}.weight.max", before, keepdims=0)
        end = constant(self._graph, "switches.largest", np.asarray(self.format.largest, np.float32))
        exact = add("Div", [largest, end], f"{name}.weight.exact_scale", before)
        least = constant(self._graph, "switches.least", np.asarray(_LEAST_SCALE, np.float32))
        scale = add("Max", [exact, least], f"{name}.weight.scale", before)
        return self._rounded(value, scale, f"{name}.weight", before, axis=1)

    def _rounded(self, value: ir.Value, scale: ir.Value, name: str, before: ir.Node, **axis: int) -> ir.Value:
        layer = next(layer for layer in self._switches if name == layer or name.startswith(f"{layer}."))
        narrow = add("QuantizeLinear", [value, scale], f"{name}.narrow", before, output_dtype=self._type, **axis)
        rounded = add("DequantizeLinear", [narrow, scale], f"{name}.rounded", before, **axis)
        return add("Where", [self._switches[layer], rounded, value], f"{name}.chosen", before)


def _switch(layer: str) -> str:
    return f"switch.{layer}"


def _session(model: ir.Model, folder: Path) -> Any:
    import onnx_ir as ir
    import onnxruntime

    proto = ir.to_proto(model)
    attention_to_multi_head_attention(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    for key, value in (
        ("model_external_initializers_file_folder_path", str(folder)),
        ("disable_prepacking", "1"),  # which copies every weight
        ("disable_quant_qdq", "1"),  # the fusion of Q/DQ does not know fp8
    ):
        options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
