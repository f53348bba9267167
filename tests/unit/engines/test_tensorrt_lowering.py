"""Graphs lowered for TensorRT compute what the canonical ones do, asked of ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.helpers.built_in import BUILT_IN
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle, load
from tmd_engines.bundle.graph_file import parse_graph
from tmd_engines.command.verify import _dims, _inputs
from tmd_engines.onnxruntime.lowering import low_precision_to_float32
from tmd_engines.tensorrt.fusion import mark_decomposable
from tmd_engines.tensorrt.lowering import lower

VERSIONS = [(10, 3), (10, 16), (11, 4)]
LATER = {"Attention", "RMSNormalization", "RotaryEmbedding"}


@pytest.fixture(scope="module")
def built_in() -> Bundle:
    return Bundle.open(BUILT_IN)


def run(model: onnx.ModelProto, feeds: dict[str, Any], folder: Path | None = None) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


@pytest.mark.parametrize("graph", GRAPHS)
def test_lowered_graphs_of_the_built_in_model_compute_the_same(built_in: Bundle, graph: str) -> None:
    with load(built_in, graph, "onnxruntime", threads=1) as engine:
        inputs = _inputs(built_in, engine, 0)
        expected = {name: engine.empty(name, **_dims(built_in)) for name in engine.outputs}
        engine.run(inputs, expected)
    for version in VERSIONS[:2]:
        model = parse_graph(built_in.read_graph(graph), graph)
        lower(model, version, {name: array.shape for name, array in inputs.items()})
        kinds = {node.op_type for node in model.graph.node}
        if version < (10, 15):
            assert not kinds & LATER and model.opset_import[0].version == 20
        else:
            assert (graph == "update" or "Attention" in kinds) and model.opset_import[0].version == 23
        low_precision_to_float32(model)
        for found, (name, wanted) in zip(run(model, inputs, built_in.folder), expected.items(), strict=True):
            error = np.abs(found.astype(np.float64) - wanted).max()
            assert error <= (1 if wanted.dtype == np.uint8 else 1e-5 * max(1, np.abs(wanted).max())), (name, version)


def one_node(kind: str, inputs: dict[str, Any], low: int = TensorProto.FLOAT, **attributes: Any) -> onnx.ModelProto:
    """A graph of one node, whose inputs are cast to `low` and its output back to float32."""
    nodes = [helper.make_node("Cast", [name], [f"{name}.low"], to=low) for name in inputs]
    nodes.append(helper.make_node(kind, [f"{name}.low" for name in inputs], ["o.low"], name="it", **attributes))
    nodes.append(helper.make_node("Cast", ["o.low"], ["o"], to=TensorProto.FLOAT))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()]
    output = helper.make_tensor_value_info("o", TensorProto.FLOAT, next(iter(inputs.values())).shape)
    graph = helper.make_graph(nodes, "g", values, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in model.graph.input}


def draw(*sizes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(8)
    return [rng.normal(size=shape).astype(np.float32) for shape in sizes]


Case = tuple[str, dict[str, Any], dict[str, Any]]  # operator, inputs, attributes


def attention(scale: float | None = None, mask: bool = False, **more: Any) -> Case:
    q, k, v, m = draw((2, 9, 48), (2, 13, 48), (2, 13, 48), (2, 4, 9, 13))
    inputs = {"q": q, "k": k, "v": v} | ({"m": m} if mask else {})
    given = {} if scale is None else {"scale": scale}
    return "Attention", inputs, {"q_num_heads": 4, "kv_num_heads": 4, **given, **more}


def rotary(**more: Any) -> Case:
    x, angle = draw((2, 9, 48), (2, 9, 6))
    return "RotaryEmbedding", {"x": x, "cos": np.cos(angle), "sin": np.sin(angle)}, {"num_heads": 4, **more}


def rms_norm(axis: int) -> Case:
    x, scale = draw((2, 5, 4, 12), (12,) if axis in (-1, 3) else (4, 12))
    return "RMSNormalization", {"x": x, "scale": scale}, {"axis": axis, "epsilon": 1e-6, "stash_type": 1}


CASES = {
    "attention": attention(),
    "attention, scale": attention(0.3, softmax_precision=1),
    "attention, mask": attention(mask=True),
    "rotary": rotary(interleaved=1),
    "rms norm": rms_norm(-1),
    "rms norm over two": rms_norm(2),
}


@pytest.mark.parametrize("version", VERSIONS[:2])
@pytest.mark.parametrize("case", CASES)
def test_lowered_node_computes_the_same(case: str, version: tuple[int, int]) -> None:
    kind, inputs, attributes = CASES[case]
    model = one_node(kind, inputs, **attributes)
    (expected,) = run(model, inputs)
    lower(model, version, shapes(model))
    if version < (10, 15):
        assert kind not in {node.op_type for node in model.graph.node}
    elif kind != "RMSNormalization":
        (node,) = (node for node in model.graph.node if node.op_type == kind)
        assert not {"q_num_heads", "num_heads"} & {attribute.name for attribute in node.attribute}
    onnx.checker.check_model(model, full_check=True)
    (found,) = run(model, inputs)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("case", ["attention, mask", "rotary", "rms norm"])
def test_low_precision_stays_where_it_is(case: str) -> None:
    """Every product of attention and rotation is still in float16, the statistics of the norm are in float32."""
    kind, inputs, attributes = CASES[case]
    model = one_node(kind, inputs, TensorProto.FLOAT16, **attributes)
    (expected,) = run(model, inputs)
    lower(model, (10, 3), shapes(model))
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in typed.value_info}
    made = {types[node.output[0]] for node in typed.node if node.op_type in ("MatMul", "Sub", "Div")}
    assert made == {TensorProto.FLOAT if kind == "RMSNormalization" else TensorProto.FLOAT16}
    assert np.abs(run(model, inputs)[0] - expected).max() < 2e-2


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes"),
    [
        attention(is_causal=1),
        attention(0.0),
        attention(softcap=9.0),
        rotary(interleaved=0),
        rotary(interleaved=1, rotary_embedding_dim=6),
    ],
    ids=["causal", "scale 0", "soft cap", "halves", "part of a head"],
)
def test_what_has_no_form_for_tensorrt_is_left_alone(kind: str, inputs: Any, attributes: Any) -> None:
    for version in VERSIONS:
        model = one_node(kind, inputs, **attributes)
        lower(model, version, shapes(model))
        assert [node.op_type for node in model.graph.node if node.name == "it"] == [kind]


@pytest.mark.parametrize(("low", "bounds"), [(TensorProto.INT64, (-3, 4)), (TensorProto.INT64, (None, 2))])
def test_integers_are_clipped_by_max_and_min(low: int, bounds: tuple[int | None, int]) -> None:
    x = np.arange(-8, 9)
    names = ["x", *("" if bound is None else f"b{i}" for i, bound in enumerate(bounds))]
    constants = [helper.make_tensor(f"b{i}", low, [], [b]) for i, b in enumerate(bounds) if b is not None]
    graph = helper.make_graph(
        [helper.make_node("Clip", names, ["o"])],
        "g",
        [helper.make_tensor_value_info("x", low, x.shape)],
        [helper.make_tensor_value_info("o", low, x.shape)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    lower(model, (10, 16), shapes(model))
    assert "Clip" not in {node.op_type for node in model.graph.node}
    assert np.array_equal(run(model, {"x": x})[0], np.clip(x, *bounds))


@pytest.mark.parametrize(
    ("low", "heads", "width", "marked"),
    [
        (TensorProto.FLOAT, 4, 12, 1),
        (TensorProto.FLOAT16, 4, 12, 0),
        (TensorProto.BFLOAT16, 4, 12, 0),
        (TensorProto.FLOAT16, 4, 8, 1),
        (TensorProto.FLOAT16, 4, 384, 1),
        (TensorProto.FLOAT16, 1, 128, 1),
    ],
)
def test_attention_without_a_fused_kernel_may_be_taken_apart(low: int, heads: int, width: int, marked: int) -> None:
    q, k, v = draw(*[(1, 3, heads * width)] * 3)
    model = one_node("Attention", {"q": q, "k": k, "v": v}, low, q_num_heads=heads, kv_num_heads=heads)
    lower(model, (10, 16), shapes(model))
    assert mark_decomposable(model, shapes(model)) == marked


def test_parser_of_tensorrt_is_not_told_in_which_type_to_sum() -> None:
    kind, inputs, attributes = CASES["attention, scale"]
    model = one_node(kind, inputs, **attributes)
    lower(model, (11, 0), shapes(model))
    (node,) = (node for node in model.graph.node if node.op_type == kind)
    assert [attribute.name for attribute in node.attribute] == ["scale"]
