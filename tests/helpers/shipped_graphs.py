"""Exports without their slowest part: graphs are not traced, but those of a bundle in float16, with other types.

Ranges are made up, where a test asks for them: they change the numbers in a graph, and not its nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import TensorProto, helper, numpy_helper

from tmd_engines import Bundle
from tmd_export import Source, export_bundle, graph_export
from tmd_export.families import FAMILIES
from tmd_export.graphs.graph import Graph
from tmd_export.quantization.calibration import FORMAT, QUANTIZABLE, Calibration, Sensitivity, identity
from tmd_export.quantization.layers import find
from tmd_export.weights.weights import Weights

_TYPES = {torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}


def retyped(model: onnx.ModelProto, folder: Path, wanted: int) -> onnx.ModelProto:
    """A graph in float16 as tmd-export writes it in another type, with its weights inside. `folder`: where they lie."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        values = _values(tensor, folder)
        if tensor.data_type == TensorProto.FLOAT16:
            values = values.astype(helper.tensor_dtype_to_np_dtype(wanted))
            tensor.data_type = wanted
        inside = helper.make_tensor(tensor.name, tensor.data_type, values.shape, values.tobytes(), raw=True)
        tensor.CopyFrom(inside)
    for node in made.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = wanted
    del made.graph.value_info[:]
    return made


def _values(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """onnx refuses a file with a second name, and an engine in another test may just have given it one."""
    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    shape, dtype = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / place["location"], dtype, "r", int(place.get("offset", 0)), shape)


def tracer(folder: Path) -> Callable[[Graph, Weights], onnx_ir.Model]:
    """What stands for `trace`: the graphs of the bundle `folder`, in the type of the weights."""

    def traced(graph: Graph, weights: Weights) -> onnx_ir.Model:
        low = {_TYPES.get(dtype, TensorProto.FLOAT) for _, dtype in weights.specs.values()} - {TensorProto.FLOAT}
        model = onnx.load(folder / f"{graph.name}.onnx", load_external_data=False)
        return onnx_ir.from_proto(retyped(model, folder, low.pop() if low else TensorProto.FLOAT))

    return traced


@contextmanager
def not_traced(folder: Path) -> Iterator[None]:
    """In here, exports take their graphs from the bundle `folder`."""
    with patch.object(graph_export, "trace", tracer(folder)):
        yield


def made_up(source: Source, shipped: Bundle, precisions: dict[str, str]) -> Calibration:
    """A calibration whose ranges are all 1, and whose first linear layer of each graph is kept."""
    ranges: dict[str, dict[str, float]] = {}
    known: dict[str, dict[str, Sensitivity]] = {precision: {} for precision in precisions.values()}
    for part in QUANTIZABLE:
        layers = find(onnx_ir.load(shipped.graph_path(part)), FAMILIES[source.family].products)
        ranges[part] = {name: 1.0 for layer in layers for name in layer.operands}
        kept = next(layer.name for layer in layers if not layer.is_attention)
        known[precisions[part]][part] = Sensitivity(everything=0.0, chosen=0.0, layers={}, kept=(kept,))
    return Calibration(
        format=FORMAT,
        checkpoint=identity(source),
        prompts=(),
        latents=(1, 1, 1),
        steps=((1, 1),),
        ranges=ranges,
        sensitivity=known,
    )


def quantized_from(source: Source, shipped: Bundle, out: Path, precisions: dict[str, str]) -> Bundle:
    """Backbone and flow head of `source` in the `precisions` of these graphs, as tmd-export writes them."""
    asked = ",".join(f"{part}={precision}" for part, precision in precisions.items())
    with not_traced(shipped.folder):
        given = made_up(source, shipped, precisions)
        return export_bundle(source, out, QUANTIZABLE, precision=asked, calibration=given, verify=False).bundle
