"""Float32 graphs that tell what happens inside: how large activations get, and what the rounding of a layer does.

Both are sessions of ONNX Runtime on the graph's own data file, from which weights are read when they are used, so that
the memory that this takes does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tmd_engines import Bundle, Engine, EngineError, Step
from tmd_engines.device.buffers import check_buffers, empty_array
from tmd_engines.onnxruntime.float4 import float4_to_float8
from tmd_engines.onnxruntime.lowering import attention_to_multi_head_attention

from .format import Format
from .formats import FORMATS
from .layers import find
from .nodes import add
from .qdq import rewrite

if TYPE_CHECKING:
    import onnx_ir as ir

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
    """A graph of which every layer in `layers` can be computed as it is or as it would be in `precision`.

    Where a precision has another format for the layers that are kept, these are computed in that one.
    """

    def __init__(self, path: Path, precision: str, ranges: Mapping[str, float], products: str) -> None:
        import onnx_ir as ir

        model, asked = ir.load(path), FORMATS[precision]
        self._outputs = [value.name or "" for value in model.graph.outputs]
        found = [
            (layer, asked.of(layer), asked.of(layer, kept=True)) for layer in find(model, products, asked.attention)
        ]
        kept = {layer.name: other for layer, format, other in found if format != other}
        self.layers = list(kept)
        chosen = [(layer, format) for layer, format, _ in found if format]
        rewrite(model.graph, chosen, ranges, _Switches(model.graph, kept))
        self._session = _session(model, path.parent)

    def __call__(self, inputs: Mapping[str, np.ndarray], layers: Collection[str]) -> Arrays:
        """The graph's outputs with `layers` quantized and no others."""
        switches = {_switch(name): np.array(name in layers) for name in self.layers}
        return dict(zip(self._outputs, self._session.run(self._outputs, {**inputs, **switches}), strict=True))


class _Switches:
    """Rounds in float32, and only where the layer's switch, an input of the graph, is on.

    `kept`: layer -> its format while its switch is off; None: it is not rounded. Other layers are rounded always.
    """

    def __init__(self, graph: ir.Graph, kept: Mapping[str, Format | None]) -> None:
        import onnx_ir as ir

        self._graph, self._kept = graph, kept
        self._switches = {
            name: ir.Value(name=_switch(name), shape=ir.Shape(()), type=ir.TensorType(ir.DataType.BOOL))
            for name in kept
        }
        graph.inputs.extend(self._switches.values())

    def activation(self, value: ir.Value, name: str, largest: float, before: ir.Node, format: Format) -> ir.Value:
        def rounded(how: Format, called: str) -> ir.Value:
            return how.activation(self._graph, value, called, largest, before, torch.float32)

        return self._chosen(value, name, before, format, rounded)

    def weight(self, value: ir.Value, name: str, before: ir.Node, format: Format) -> ir.Value:
        def rounded(how: Format, called: str) -> ir.Value:
            return how.weight(self._graph, value, called, before)

        return self._chosen(value, f"{name}.weight", before, format, rounded)

    def _chosen(
        self,
        value: ir.Value,
        name: str,
        before: ir.Node,
        format: Format,
        rounded: Callable[[Format, str], ir.Value],
    ) -> ir.Value:
        on = rounded(format, name)
        layer = next((layer for layer in self._kept if name == layer or name.startswith(f"{layer}.")), None)
        if layer is None:
            return on
        other = self._kept[layer]
        off = value if other is None else rounded(other, f"{name}.kept")
        return add("Where", [self._switches[layer], on, off], f"{name}.chosen", before)


def _switch(layer: str) -> str:
    return f"switch.{layer}"


def _session(model: ir.Model, folder: Path) -> Any:
    import onnx_ir as ir
    import onnxruntime

    proto = ir.to_proto(model)
    float4_to_float8(proto)
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
