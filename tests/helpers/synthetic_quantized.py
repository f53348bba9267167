"""The synthetic bundle in 8 bits: linear layers between Q/DQ, in bfloat16, as tmd-export writes them; without torch.

The operators, types and roundings are those of an export. Accuracy is nobody's concern here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import synthetic
from tests.helpers.synthetic import DIM, GRAPHS, GraphBuilder, manifest_without_files, tokenizer_bytes, write_graph
from tmd_engines import BundleWriter

QUANTIZED = ("backbone", "flow_head")
_TYPES = {"int8": (TensorProto.INT8, 127.0), "fp8": (TensorProto.FLOAT8E4M3FN, 448.0)}
_ACTIVATION_SCALE = 2.0**-5


def _constant(g: GraphBuilder, elem_type: int, values: float | np.ndarray) -> str:
    exact = np.asarray(values, np.float32).astype(helper.tensor_dtype_to_np_dtype(elem_type))
    g.weights.append(numpy_helper.from_array(exact, f"w{len(g.weights)}"))
    return g.weights[-1].name


def _linear(g: GraphBuilder, x: str, weight: np.ndarray, precision: str, out: str) -> None:
    """x times `weight` [in, out], both rounded to 8 bits, one scale per column of the weight."""
    elem_type, largest = _TYPES[precision]
    columns = np.abs(weight).max(0) / largest
    scaled = weight / columns
    quantized = _constant(g, elem_type, np.round(scaled) if precision == "int8" else scaled)
    columns_scale = _constant(g, TensorProto.BFLOAT16, columns)
    scale = _constant(g, TensorProto.BFLOAT16, _ACTIVATION_SCALE)
    zero = _constant(g, elem_type, 0.0)
    low = g.op("Cast", x, to=TensorProto.BFLOAT16, out=f"{out}.low")
    bits = g.op("QuantizeLinear", low, scale, zero, out=f"{out}.bits")
    rounded = g.op("DequantizeLinear", bits, scale, zero, out=f"{out}.rounded")
    matrix = g.op("DequantizeLinear", quantized, columns_scale, axis=1, out=f"{out}.matrix")
    product = g.op("MatMul", rounded, matrix, out=f"{out}.product")
    g.op("Cast", product, to=TensorProto.FLOAT, out=out)


def quantized_graph(name: str, precision: str) -> GraphBuilder:
    """A graph of the synthetic bundle with every product of weights in 8 bits, and one more before each norm."""
    g: GraphBuilder = getattr(synthetic, name)()
    weights = {weight.name: numpy_helper.to_array(weight) for weight in g.weights}
    before, g.nodes = g.nodes, []
    for node in before:
        if node.op_type == "MatMul":
            _linear(g, node.input[0], weights[node.input[1]], precision, node.output[0])
            continue
        if node.op_type == "LayerNormalization":
            more = np.random.default_rng(3).normal(0, DIM**-0.5, (DIM, DIM))
            _linear(g, node.input[0], more, precision, f"{node.name}.linear")
            node.input[0] = g.op("Add", node.input[0], f"{node.name}.linear", out=f"{node.name}.sum")
        g.nodes.append(node)
    for number, node in enumerate(g.nodes):
        node.name = f"n{number}"
    used = {name for node in g.nodes for name in node.input}
    g.weights = [weight for weight in g.weights if weight.name in used]
    return g


def quantized_models(precision: str) -> dict[str, onnx.ModelProto]:
    """The graphs by name, weights inside."""
    return {name: quantized_graph(name, precision).model() for name in QUANTIZED}


def write_quantized_bundle(folder: str | Path, precision: dict[str, str]) -> Path:
    """Writes a complete bundle under the new folder `folder`; `precision` is int8 or fp8 for each of `QUANTIZED`."""
    with BundleWriter(folder) as writer:
        entries = {}
        for name in GRAPHS:
            builder = quantized_graph(name, precision[name]) if name in precision else getattr(synthetic, name)()
            entries[name] = write_graph(writer.folder, builder) | {"precision": precision.get(name, "fp32")}
        (writer.folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        return writer.commit(manifest_without_files(entries)).folder
