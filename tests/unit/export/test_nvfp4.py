"""NVFP4 bit by bit: the numbers against the format's definition, and graphs against the numbers, on two engines."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tests.helpers.export_tools import small_source
from tests.helpers.synthetic_quantized import quantized_models
from tmd_engines.bundle.float4 import VALUES as CODES
from tmd_engines.onnxruntime import float4
from tmd_export.families.build import build
from tmd_export.graphs import rules
from tmd_export.quantization import nvfp4
from tmd_export.quantization.formats import FP8, NVFP4
from tmd_export.quantization.layers import Layer
from tmd_export.quantization.weights import QuantizedWeights

Floats = NDArray[np.float32]


def e2m1(code: int) -> float:
    """By definition: sign, two bits of exponent with a bias of 1, one bit of mantissa; no infinity, no NaN."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def e4m3(code: int) -> float:
    """By definition: four bits of exponent with a bias of 7, three of mantissa; the last code is NaN."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)


def nearest(values: Floats, table: list[float]) -> NDArray[np.uint8]:
    """Codes of the nearest of a table's values, in float64; of two as near, the even code; the end for all beyond."""
    bounded = np.minimum(values.astype(np.float64), max(table))
    distance = np.abs(bounded[:, None] - np.array(table))
    least = distance.min(1, keepdims=True)
    odd = np.arange(len(table)) % 2
    found: NDArray[np.uint8] = np.where(distance == least, odd, 2).argmin(1).astype(np.uint8)
    return found


def every_bfloat16() -> Floats:
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    return values[np.isfinite(values)]


def around(values: list[float]) -> Floats:
    """The points halfway between neighbours, and the numbers of float32 on both sides of each."""
    ends = np.unique(np.array(values))
    middles = ((ends[1:] + ends[:-1]) / 2).astype(np.float32)
    return np.concatenate([middles, *(np.nextafter(middles, np.float32(end)) for end in (-np.inf, np.inf))])


E2M1 = [e2m1(code) for code in range(16)]
VALUES = np.array(CODES, np.float32)
E4M3 = [e4m3(code) for code in range(127)]


def test_all_codes_have_the_values_of_the_definition() -> None:
    codes = np.arange(16, dtype=np.uint8)
    others = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    for found in (VALUES, others):
        assert np.array_equal(found, np.array(E2M1)) and np.array_equal(np.signbit(found), codes > 7)
    scales = np.arange(127, dtype=np.uint8)
    assert np.array_equal(nvfp4.decode_scales(scales), np.array(E4M3, np.float32)) and E4M3[-1] == 448


def test_every_value_becomes_the_nearest_code_ties_to_even_and_ends_saturate() -> None:
    values = np.concatenate([every_bfloat16(), around(E2M1)])
    codes = nvfp4.encode(values)
    expected = nearest(np.abs(values), E2M1[:8]) | (np.signbit(values).astype(np.uint8) << 3)
    assert np.array_equal(codes, expected)
    inside = np.abs(values) <= 6
    assert np.array_equal(codes[inside], values[inside].astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    assert set(VALUES[codes[~inside]]) == {-6.0, 6.0}


def test_every_block_gets_the_nearest_scale() -> None:
    wanted = np.concatenate([np.abs(every_bfloat16()), np.abs(around(E4M3))])
    wanted = wanted[wanted < 1e30]  # 2^20 and 6 times as large are numbers too
    largest = wanted * np.float32(6)
    exact = (largest / np.float32(6)).astype(np.float32)
    assert np.array_equal(nvfp4.block_scales(largest, 1.0), nearest(exact, E4M3))
    assert np.array_equal(nvfp4.block_scales(largest, 2.0**-20), nearest(exact * np.float32(2**20), E4M3))


def test_the_scale_of_a_tensor_is_the_power_of_two_from_the_largest_value_on() -> None:
    for largest in (1e-30, 0.3, 2687.99, 2688.0, 2688.1, 7e4):
        exact, found = largest / (6 * 448), nvfp4.tensor_scale(largest)
        assert exact <= found < 2 * exact and np.frexp(found)[0] == 0.5
    assert nvfp4.tensor_scale(0.0) == 1.0
    assert nvfp4.tensor_scale(1e-44) == 2.0**-126  # not zero, and not subnormal


def random_blocks(seed: int = 0) -> Floats:
    """Blocks of all sizes, one of zeros, one whose scale becomes zero, one beyond the range."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 5, 64)) * 10.0 ** rng.uniform(-4, 1, (2, 5, 4)).repeat(16, -1)
    values[0, 0, :16], values[0, 0, 16:32], values[0, 1, :16] = 0, 1e-7, 1e4
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)  # what an activation can be


def test_blocks_are_what_the_two_levels_say_and_exact_in_bfloat16() -> None:
    values, scale = random_blocks(), nvfp4.tensor_scale(50.0)
    codes, scales = nvfp4.quantize(values, scale)
    found = nvfp4.dequantize(codes, scales, scale)
    assert np.array_equal(found, found.astype(ml_dtypes.bfloat16).astype(np.float32))
    blocks = values.reshape(-1, 16)
    wide = nearest(np.abs(blocks).max(1) / np.float32(6) / np.float32(scale), E4M3)
    divisors = np.array(E4M3)[wide] * scale
    for block, divisor, row in zip(blocks, divisors, found.reshape(-1, 16), strict=True):
        assert divisor or not row.any()
        if divisor:
            ratio = (block / np.float32(divisor)).astype(np.float32)
            assert np.array_equal(np.abs(row), np.array(E2M1)[nearest(np.abs(ratio), E2M1[:8])] * divisor)
    assert not found[0, 0, :32].any() and found[0, 1, :16].max() == 6 * 448 * scale


def graph_of(dtype: torch.dtype) -> onnx.ModelProto:
    """x, rounded as an export writes it, in a graph of its own."""
    kind = onnx_ir.DataType.FLOAT if dtype == torch.float32 else onnx_ir.DataType.BFLOAT16
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["b", "n", 64]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    first = onnx_ir.node("Cast", [x], attributes={"to": int(kind)})
    last = onnx_ir.node("Cast", [first.outputs[0]], attributes={"to": int(onnx_ir.DataType.FLOAT)})
    last.outputs[0].name, last.outputs[0].type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph([x], last.outputs, nodes=[first, last], opset_imports={"": 23}, name="g")
    rounded = NVFP4.activation(graph, first.outputs[0], "it", 50.0, last, dtype)
    last.replace_input_with(0, rounded)
    return onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=11))


def on_onnxruntime(model: onnx.ModelProto, **inputs: Any) -> Floats:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Floats = session.run(None, inputs)[0]
    return found


def test_graphs_compute_these_numbers_on_onnx_and_on_onnx_runtime() -> None:
    """ONNX's own evaluator runs the graph as it is in a bundle, with its own float4; ONNX Runtime gets it lowered."""
    values, scale = random_blocks(), nvfp4.tensor_scale(50.0)
    expected = nvfp4.dequantize(*nvfp4.quantize(values, scale), scale)
    model = graph_of(torch.float32)
    [by_onnx] = ReferenceEvaluator(model).run(None, {"x": values})
    assert np.array_equal(by_onnx, expected)
    assert float4.float4_to_float8(model) == 1
    found = on_onnxruntime(model, x=values)
    assert np.array_equal(found, expected) and np.array_equal(np.signbit(found), np.signbit(expected))


def test_ties_of_a_graph_go_to_the_even_code() -> None:
    ratios = np.concatenate([around(E2M1), np.array(E2M1, np.float32)])
    rows = np.zeros((1, len(ratios), 64), np.float32)
    rows[0, :, 0::16], rows[0, :, 1::16] = 6.0, ratios[:, None]  # a scale of 1 for every block
    scale = nvfp4.tensor_scale(50.0)
    model = graph_of(torch.float32)
    float4.float4_to_float8(model)
    found = on_onnxruntime(model, x=rows)[0, :, 1]
    assert np.array_equal(np.abs(found), np.array(E2M1)[nearest(np.abs(ratios), E2M1[:8])])
    assert nvfp4.decode_scales(nvfp4.block_scales(np.array([6.0], np.float32), scale)) * scale == 1.0


def test_weights_are_four_bits_in_the_file_and_the_same_numbers_in_a_graph() -> None:
    source, name = small_source(), "blocks.0.ffn.0.weight.T"
    exact = source.tensor("student", "backbone.blocks.0.ffn.0.weight").float().numpy().T  # [K, N]
    stored = QuantizedWeights(build(source, "backbone", "nvfp4")[1], {name: NVFP4})
    parts = {
        ending: torch.cat([chunk.reshape(-1) for chunk in stored.chunks(name + ending)]).view(torch.uint8).numpy()
        for ending in (".quantized", ".block_scale", ".tensor_scale")
    }
    assert 2 * parts[".quantized"].size == 16 * parts[".block_scale"].size == exact.size
    kinds = dict(zip(parts, (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT), strict=True))
    weights = [
        TensorProto(
            name=ending, data_type=kinds[ending], dims=list(stored.form(name + ending)[0]), raw_data=part.tobytes()
        )
        for ending, part in parts.items()
    ]
    scale = float(numpy_helper.to_array(weights[2]))
    assert scale == nvfp4.tensor_scale(float(np.abs(exact).max()))
    codes, scales = nvfp4.quantize(np.ascontiguousarray(exact.T), scale)
    expected = nvfp4.dequantize(codes, scales, scale).T
    assert np.array_equal(numpy_helper.to_array(weights[0]).astype(np.float32), VALUES[codes].T)  # onnx unpacks
    nodes = [
        helper.make_node("DequantizeLinear", [".block_scale", ".tensor_scale"], ["scales"]),
        helper.make_node("DequantizeLinear", [".quantized", "scales"], ["y"], axis=0, block_size=16),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, exact.shape)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], outputs, weights), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    assert float4.float4_to_float8(model) == 1
    assert np.array_equal(on_onnxruntime(model), expected)
    assert np.linalg.norm(expected - exact) / np.linalg.norm(exact) < 0.12


@pytest.mark.parametrize(("rows", "expected"), [(48, NVFP4), (40, FP8)])
def test_what_does_not_divide_into_blocks_stays_fp8(rows: int, expected: object) -> None:
    x, weight = (onnx_ir.Value(name=name, shape=onnx_ir.Shape([rows, 8])) for name in "xw")
    product = Layer("it", onnx_ir.node("MatMul", [x, weight]), 8)
    assert NVFP4.of(product) is expected and NVFP4.of(product, kept=True) is FP8
    assert NVFP4.of(Layer("it", onnx_ir.node("Attention", [x, x, x]), 8)) is FP8


def test_an_export_in_another_form_is_refused() -> None:
    def problems(model: onnx.ModelProto) -> list[str]:
        return [*rules.quantization(model), *rules.float4(model)]

    def node_of(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
        return next(node for node in model.graph.node if node.op_type == kind)

    def dequantizes_weight(model: onnx.ModelProto) -> onnx.NodeProto:
        name = next(weight.name for weight in model.graph.initializer if weight.data_type == TensorProto.FLOAT4E2M1)
        return next(node for node in model.graph.node if name in node.input)

    assert problems(quantized_models("nvfp4")["flow_head"]) == []
    means = quantized_models("nvfp4")["flow_head"]
    node_of(means, "ReduceMax").op_type = "ReduceMean"
    assert any("another form than blocks with scales found while running" in each for each in problems(means))
    wide = quantized_models("nvfp4")["flow_head"]
    next(part for part in dequantizes_weight(wide).attribute if part.name == "block_size").i = 32
    assert any("is not dequantized in blocks of 16 along its first axis" in each for each in problems(wide))
