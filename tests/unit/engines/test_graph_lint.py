"""What older parsers of TensorRT take: all graphs of a bundle pass when lowered, and planted violations are named."""

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
from onnx import TensorProto, helper

from tests.helpers.built_in import BUILT_IN
from tests.helpers.synthetic import GRAPHS
from tmd_engines import Bundle, EngineError
from tmd_engines.bundle.graph_file import parse_graph
from tmd_engines.command.verify import _dims
from tmd_engines.onnxruntime.lowering import low_precision_to_float32
from tmd_engines.tensorrt.lint import check_graph, lint
from tmd_engines.tensorrt.lowering import lower

VERSIONS = [(10, 3), (10, 15)]
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


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
        if version == (10, 3):  # each has something for the lowering to do
            assert graph == "update" or lint(model, shapes, version)
        lowered = onnx.ModelProto()
        lowered.CopyFrom(model)
        lower(lowered, version, shapes)
        assert lint(lowered, shapes, version) == []
        low = {"fp32": FLOAT, "fp16": HALF, "bf16": TensorProto.BFLOAT16}[precision]
        assert graph in ("text_encoder", "update") or low in {weight.data_type for weight in lowered.graph.initializer}


X = {"x": (1, 4, 8)}


def small() -> onnx.ModelProto:
    """x -> a product in float16, a slice, one more operator."""
    axes = [
        helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in {"0": 0, "4": 4, "1": 1}.items()
    ]
    weights = [*axes, helper.make_tensor("w", HALF, [8, 8], np.ones(64, np.float16))]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("Slice", ["y", "0", "4", "1"], ["z"], name="part"),
        helper.make_node("Relu", ["z"], ["out"], name="last"),
    ]
    values = [
        helper.make_tensor_value_info("x", HALF, [1, 4, 8]),
        helper.make_tensor_value_info("out", HALF, [1, 4, 8]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.name == name)


def replaced(model: onnx.ModelProto, name: str, kind: str, inputs: list[str], **attributes: Any) -> None:
    old = node(model, name)
    old.CopyFrom(helper.make_node(kind, inputs, list(old.output), name=name, **attributes))


def computed_axes(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Identity", ["1"], ["axes"]))
    node(model, "part").input[3] = "axes"


def half_of_a_narrow_operator(model: onnx.ModelProto) -> None:
    """bfloat16 in an operator that has none."""
    model.graph.node.insert(2, helper.make_node("Cast", ["z"], ["z.bf16"], to=TensorProto.BFLOAT16))
    replaced(model, "last", "Cast", ["mish"], to=HALF)
    model.graph.node.insert(3, helper.make_node("Mish", ["z.bf16"], ["mish"], name="narrow"))


PLANTED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "operator": (lambda m: replaced(m, "last", "Det", ["z"]), "Det 'last' is an operator that it has not"),
    "later operator": (lambda m: replaced(m, "last", "RMSNormalization", ["z", "w"]), "an operator that it has not"),
    "domain": (lambda m: setattr(node(m, "last"), "domain", "com.example"), "an operator that it has not"),
    "opset": (lambda m: setattr(m.opset_import[0], "version", 23), "written in opset 23, and the parser reads 9 to 20"),
    "type": (half_of_a_narrow_operator, "Mish 'narrow' has BF16 data ('z.bf16'), and it takes FP16 FP32"),
    "axes": (computed_axes, "the axes of Slice 'part' are computed, and must be a constant"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_what_is_planted_is_found(case: str) -> None:
    plant, said = PLANTED[case]
    model = small()
    assert lint(model, X, (10, 3)) == []
    plant(model)
    problems = lint(model, X, (10, 3))
    assert any(said in problem for problem in problems), problems
    with pytest.raises(EngineError, match=r"TensorRT 10.3 cannot take it: .*another engine or precision"):
        check_graph(model, X, (10, 3), "it")
    assert lint(model, X, (11, 0)) == []  # whose parser is asked itself


@pytest.mark.parametrize(("version", "first"), [((10, 0), 0), ((10, 14), 0), ((10, 15), 1), ((10, 99), 1)])
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
