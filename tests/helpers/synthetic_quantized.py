"""The synthetic bundle in 8 and 4 bits: linear layers between Q/DQ, in bfloat16, as tmd-export writes them; no torch.

The operators, types and roundings are those of an export. Accuracy is nobody's concern here.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers import synthetic
from tests.helpers.synthetic import DIM, GRAPHS, GraphBuilder, manifest_without_files, tokenizer_bytes, write_graph
from tmd_engines import BundleWriter
from tmd_engines.bundle.float4 import BLOCK_SCALES

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


def _linear4(g: GraphBuilder, x: str, weight: np.ndarray, out: str) -> None:
    """x times `weight` [in, out] in NVFP4: blocks of 16 along `in`, those of x with scales found while running."""
    rows, columns = weight.shape
    blocks = weight.reshape(rows // 16, 16, columns)
    exact = np.abs(blocks).max(1) / 6 * 64  # with a scale of 1/64 for all
    scales = exact.astype(ml_dtypes.float8_e4m3fn)
    codes = (blocks * 64 / scales.astype(np.float32)[:, None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed = codes.reshape(-1, 2)
    name = f"{out}.weight"
    content = (packed[:, 0] | packed[:, 1] << 4).astype(np.uint8).tobytes()
    g.weights.append(TensorProto(name=name, data_type=TensorProto.FLOAT4E2M1, dims=weight.shape, raw_data=content))
    one = _constant(g, TensorProto.FLOAT, 2.0**-6)
    g.weights.append(numpy_helper.from_array(scales, f"{name}{BLOCK_SCALES}"))
    wide = g.op("DequantizeLinear", g.weights[-1].name, one, out=f"{out}.wide")
    narrow = g.op("Cast", wide, to=TensorProto.BFLOAT16, out=f"{out}.narrow")
    matrix = g.op("DequantizeLinear", name, narrow, axis=0, block_size=16, out=f"{out}.matrix")

    low = g.op("Cast", x, to=TensorProto.BFLOAT16, out=f"{out}.low")
    size = g.op("Abs", low, out=f"{out}.size")
    grid = g.op(
        "Concat",
        g.op("Shape", low, end=-1, out=f"{out}.outer"),
        g.constant([-1, 16], np.int64),
        axis=0,
        out=f"{out}.grid",
    )
    rows_ = g.op("Reshape", size, grid, out=f"{out}.blocks")
    largest = g.op("ReduceMax", rows_, g.constant([-1], np.int64), keepdims=0, out=f"{out}.max")
    largest = g.op("Cast", largest, to=TensorProto.FLOAT, out=f"{out}.wide_max")
    exact_ = g.op("Div", largest, _constant(g, TensorProto.FLOAT, 6.0), out=f"{out}.exact")
    scale = _constant(g, TensorProto.FLOAT, _ACTIVATION_SCALE)
    kind = TensorProto.FLOAT8E4M3FN
    coded = g.op("QuantizeLinear", exact_, scale, output_dtype=kind, out=f"{out}.scales")
    found = g.op("DequantizeLinear", coded, scale, out=f"{out}.wide_scales")
    divisor = g.op("Clip", found, _constant(g, TensorProto.FLOAT, 2.0**-126), out=f"{out}.divisor")
    kind = TensorProto.FLOAT4E2M1
    bits = g.op("QuantizeLinear", low, divisor, axis=-1, block_size=16, output_dtype=kind, out=f"{out}.bits")
    steps = g.op("Cast", found, to=TensorProto.BFLOAT16, out=f"{out}.steps")
    rounded = g.op("DequantizeLinear", bits, steps, axis=-1, block_size=16, out=f"{out}.rounded")
    product = g.op("MatMul", rounded, matrix, out=f"{out}.product")
    g.op("Cast", product, to=TensorProto.FLOAT, out=out)


def quantized_graph(name: str, precision: str) -> GraphBuilder:
    """A graph of the synthetic bundle with every product of weights in 8 or 4 bits, and one more before each norm."""
    g: GraphBuilder = getattr(synthetic, name)()
    weights = {weight.name: numpy_helper.to_array(weight) for weight in g.weights}
    before, g.nodes = g.nodes, []

    def linear(x: str, weight: np.ndarray, out: str) -> None:
        if precision == "nvfp4":
            _linear4(g, x, weight, out)
        else:
            _linear(g, x, weight, precision, out)

    for node in before:
        if node.op_type == "MatMul":
            linear(node.input[0], weights[node.input[1]], node.output[0])
            continue
        if node.op_type == "LayerNormalization":
            more = np.random.default_rng(3).normal(0, DIM**-0.5, (DIM, DIM))
            linear(node.input[0], more, f"{node.name}.linear")
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
    """Writes a complete bundle under the new folder `folder`; `precision`: that of each of `QUANTIZED`."""
    with BundleWriter(folder) as writer:
        entries = {}
        for name in GRAPHS:
            builder = quantized_graph(name, precision[name]) if name in precision else getattr(synthetic, name)()
            entries[name] = write_graph(writer.folder, builder) | {"precision": precision.get(name, "fp32")}
        (writer.folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        return writer.commit(manifest_without_files(entries)).folder
