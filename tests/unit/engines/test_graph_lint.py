"""What TensorRT's parser takes: all graphs of a bundle pass when lowered, and every planted violation is named."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.built_in import BUILT_IN
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle, EngineError
from tmd_engines.bundle.graph_file import parse_graph
from tmd_engines.command.verify import _dims
from tmd_engines.onnxruntime.lowering import low_precision_to_float32
from tmd_engines.tensorrt.lint import check_graph, lint
from tmd_engines.tensorrt.lowering import lower

VERSIONS = [(10, 3), (10, 15), (11, 4)]
FP8, HALF, FLOAT = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16, TensorProto.FLOAT


@pytest.fixture(scope="module")
def built_in() -> Bundle:
    return Bundle.open(BUILT_IN)


def in_precision(model: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """A float16 graph in another precision, as far as types go: what the exporter writes differs in nothing else."""
    if precision == "fp32":
        low_precision_to_float32(model)
    elif precision == "bf16":
        for weight in model.graph.initializer:
            if weight.data_type == HALF:
                weight.data_type = TensorProto.BFLOAT16
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.i == HALF:
                    attribute.i = TensorProto.BFLOAT16
    return model


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_graphs_of_the_built_in_model_pass_lowered_and_not_before(built_in: Bundle, graph: str, precision: str) -> None:
    model = in_precision(parse_graph(built_in.read_graph(graph), graph), precision)
    shapes = {spec.name: spec.resolve(**_dims(built_in)) for spec in built_in.graph_info(graph).inputs}
    for version in VERSIONS:
        assert graph == "update" or lint(
            model, shapes, version, built_in.folder
        )  # each has something for the lowering to do
        lowered = onnx.ModelProto()
        lowered.CopyFrom(model)
        lower(lowered, version, shapes)
        assert lint(lowered, shapes, version, built_in.folder) == []
        low = {"fp32": FLOAT, "fp16": HALF, "bf16": TensorProto.BFLOAT16}[precision]
        assert graph in ("text_encoder", "update") or low in {weight.data_type for weight in lowered.graph.initializer}


def constant(name: str, values: Any, kind: int = HALF) -> onnx.TensorProto:
    array = np.asarray(values, np.float32)
    return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def attention_in_fp8() -> onnx.ModelProto:
    """x -> linear with an FP8 weight -> attention of one head, in FP8 at all four inputs of its products."""
    nodes, weights = [], [constant("scale", 0.5), constant("zero", 0.0, FP8), constant("small", 1 / 448)]
    weights += [constant("w", np.ones((32, 32)), FP8), constant("per_channel", np.ones(32)), constant("unit", 0.2)]

    def quantized(name: str, scale: str = "scale") -> str:
        nodes.append(helper.make_node("QuantizeLinear", [name, scale, "zero"], [f"{name}.q"], name=f"q/{name}"))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.q", scale, "zero"], [f"{name}.dq"], name=f"dq/{name}")
        )
        return f"{name}.dq"

    def add(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    add("DequantizeLinear", ["w", "per_channel"], "w.dq", axis=1)
    y = add("MatMul", [quantized("x"), "w.dq"], "y")
    add("Mul", [y, "unit"], "query")
    add("Transpose", [y], "key", perm=[0, 1, 3, 2])
    add("Identity", [y], "value")
    add("MatMul", [quantized("query"), quantized("key")], "scores")
    add("Softmax", ["scores"], "weights", axis=-1)
    add("MatMul", [quantized("weights", "small"), quantized("value")], "out")
    values = [helper.make_tensor_value_info(name, HALF, [1, 1, 8, 32]) for name in ("x", "out")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


X = {"x": (1, 1, 8, 32)}


def test_fp8_attention_and_linear_layers_pass() -> None:
    for version in VERSIONS:
        assert lint(attention_in_fp8(), X, version) == []


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def weight(model: onnx.ModelProto, name: str, values: Any, kind: int = HALF) -> None:
    next(each for each in model.graph.initializer if each.name == name).CopyFrom(constant(name, values, kind))


def replaced(model: onnx.ModelProto, name: str, kind: str, inputs: list[str], **attributes: Any) -> None:
    old = node(model, name)
    old.CopyFrom(helper.make_node(kind, inputs, list(old.output), name=name, **attributes))


def without_zero_point(model: onnx.ModelProto) -> None:
    del node(model, "q/x").input[2]
    replaced(model, "dq/x", "DequantizeLinear", ["x.q", "scale"])


def unquantized_softmax(model: onnx.ModelProto) -> None:
    node(model, "out").input[0] = "weights"


def transposed_weight(model: onnx.ModelProto) -> None:
    transpose = helper.make_node("Transpose", ["w.dq"], ["w.t"], name="t", perm=[1, 0])
    model.graph.node.insert(1, transpose)
    node(model, "y").input[1] = "w.t"


def quantized_into_add(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["x.q"], ["left.over"], name="wrong"))


def bytes_inside(model: onnx.ModelProto) -> None:
    replaced(model, "value", "Cast", ["y.bytes"], to=HALF)
    model.graph.node.insert(4, helper.make_node("Cast", ["y"], ["y.bytes"], name="bytes", to=TensorProto.UINT8))


def narrow_heads(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Slice", ["w.whole", "from", "to", "axis"], ["w.dq"], name="cut"))
    node(model, "w.dq")  # the DequantizeLinear
    for each in model.graph.node:
        if each.op_type == "DequantizeLinear" and each.input[0] == "w":
            each.output[0] = "w.whole"
            dequantize = each
    moved = onnx.NodeProto()
    moved.CopyFrom(dequantize)
    model.graph.node.remove(dequantize)
    model.graph.node.insert(0, moved)
    for name, value in (("from", 0), ("to", 24), ("axis", 1)):
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], [value]))
    model.graph.output[0].type.tensor_type.shape.dim[3].dim_value = 24


PLANTED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "operator": (lambda m: replaced(m, "value", "Det", ["y"]), "Det 'value' is an operator that it has not"),
    "domain": (lambda m: setattr(node(m, "value"), "domain", "com.example"), "an operator that it has not"),
    "opset": (lambda m: setattr(m.opset_import[0], "version", 26), "written in opset 26"),
    "type": (
        lambda m: replaced(m, "value", "Mish", ["y"]) or setattr(node(m, "value"), "op_type", "NonZero"),
        "NonZero",
    ),
    "uint8 inside": (bytes_inside, "'y.bytes' is UINT8 inside the network"),
    "no zero point": (without_zero_point, "QuantizeLinear 'q/x' has neither a zero point nor output_dtype"),
    "zero point": (lambda m: weight(m, "zero", 1.0, FP8), "a zero point that is not zero"),
    "scale": (lambda m: weight(m, "small", -1.0), "a scale that is not above zero"),
    "scale's type": (lambda m: weight(m, "small", 0.1, TensorProto.BFLOAT16), "inconsistent type"),
    "channels of activations": (lambda m: weight(m, "scale", np.ones(32)), "a scale per channel, which only weights"),
    "axis": (lambda m: weight(m, "per_channel", np.ones(31)), "31"),
    "quantized value used": (quantized_into_add, "'x.q' is FP8 and goes into Identity 'wrong'"),
    "transposed weight": (transposed_weight, "goes into Transpose 't', not straight into a product"),
    "half of an attention": (unquantized_softmax, "FP8 in some inputs of its products"),
    "narrow heads": (narrow_heads, "with heads of 24, and needs a multiple of 16"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_planted_is_found(case: str) -> None:
    plant, said = PLANTED[case]
    model = attention_in_fp8()
    plant(model)
    try:
        problems = lint(model, X, (10, 3))
    except Exception as error:  # onnx's own rules are the first to be broken by some
        problems = [str(error)]
    assert any(said in problem for problem in problems), problems


def test_blocks_of_int8_are_refused_and_said_in_one_sentence() -> None:
    """As in the text encoder that tmd-export stores in int8."""
    weights = [constant("w", np.ones((32, 16)), TensorProto.INT8), constant("s", np.ones((2, 16)), FLOAT)]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["w.dq"], name="dq", axis=0, block_size=16),
        helper.make_node("MatMul", ["x", "w.dq"], ["o"], name="product"),
    ]
    values = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in (("x", [4, 32]), ("o", [4, 16]))]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with pytest.raises(EngineError, match=r"TensorRT 11.4 cannot take it: .*INT8 values in blocks.*another engine"):
        check_graph(model, {"x": (4, 32)}, (11, 4), "it")


@pytest.mark.parametrize(
    ("version", "first"), [((10, 0), 0), ((10, 14), 0), ((10, 15), 1), ((10, 99), 1), ((11, 0), 2)]
)
def test_the_matrix_goes_by_version(version: tuple[int, int], first: int) -> None:
    from tmd_engines.tensorrt.support import SUPPORT, support_of

    assert support_of(version) is SUPPORT[first]


def test_build_writes_graphs_and_command_lines_for_nvidias_tools(built_in: Bundle, tmp_path: Path) -> None:
    from tmd_engines.command.build import write_for_trtexec

    written = list(write_for_trtexec(built_in, tmp_path / "out", (10, 16), (64, 64, 17)))
    commands = {graph: command for graph, command, _ in written}
    assert list(commands) == list(built_in.manifest.graphs)
    assert "--optShapes=x:1x16x5x8x8,t:1,prompt_embeds:1x32x64,rope_cos:80x16,rope_sin:80x16" in commands["backbone"]
    for graph in commands:
        model = onnx.load(tmp_path / "out" / f"{graph}.onnx")  # finds its weights there
        assert graph == "update" or "Attention" in {each.op_type for each in model.graph.node}
    with pytest.raises(EngineError, match="is the bundle itself"):
        next(write_for_trtexec(built_in, built_in.folder, (10, 16), (64, 64, 17)))
    with pytest.raises(ValueError, match="multiple of"):
        next(write_for_trtexec(built_in, tmp_path, (10, 16), (65, 64, 17)))


def test_polygraphy_takes_its_command_lines(built_in: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's own package reads the options, and runs what needs no TensorRT: the lowered graph on ONNX Runtime."""
    from tmd_engines.command.build import write_for_trtexec

    monkeypatch.setenv("TMD_TENSORRT_WORKSPACE", "512")
    for graph, _, line in write_for_trtexec(built_in, tmp_path, (10, 3), (64, 64, 17)):
        if graph not in ("backbone", "decoder_first"):  # a second each
            continue
        _, *arguments = shlex.split(line)
        script = tmp_path / f"{graph}.py"
        command = [sys.executable, "-c", "from polygraphy.tools import main; main()", *arguments]
        done = subprocess.run([*command, "--gen-script", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said = script.read_text()
        assert "strongly_typed=True" in said and "WORKSPACE: 536870912" in said and "OnnxrtRunner" in said
        assert "tf32" not in said  # which Polygraphy has off, as we have
        alone = [word for word in command if word not in ("--trt", "--strongly-typed")]
        done = subprocess.run(alone, capture_output=True, text=True)
        assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout + done.stderr
