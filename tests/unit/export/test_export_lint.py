"""Every rule of the lint, broken one at a time on a small graph made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tmd_engines import TensorSpec
from tmd_export import ExportError
from tmd_export.graphs.rules import lint

INPUTS = (TensorSpec(name="x", dtype="float32", shape=("batch", "tokens", 8)),)
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=("batch", "tokens", 8)),)
Edit = Callable[[onnx.ModelProto], object]


def attention(*, name: str = "n1", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Attention", ["h", "h", "h"], ["a"], name=name, **attributes)


def good_model() -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.zeros((8, 200), np.float32)[:, :8].copy(), "w")
    large = numpy_helper.from_array(np.ones((8, 64), np.float32), "large")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="n0"),
        attention(q_num_heads=2, kv_num_heads=2),
        helper.make_node("MatMul", ["a", "large"], ["y0"], name="n2"),
        helper.make_node("Slice", ["y0", "start", "end", "axis"], ["y"], name="n3"),
    ]
    small = [numpy_helper.from_array(np.array([v]), n) for n, v in (("start", 0), ("end", 8), ("axis", 2))]
    shape: list[str | int] = ["batch", "tokens", 8]
    graph = helper.make_graph(
        nodes,
        "good",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [weight, large, *small],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def write(folder: Path, edit: Edit | None = None) -> Path:
    path = folder / "good.onnx"
    onnx.save_model(good_model(), path, save_as_external_data=True, location="good.onnx.data", size_threshold=200)
    if edit:
        model = onnx.load(path, load_external_data=False)
        edit(model)
        path.write_bytes(model.SerializeToString())
    return path


def set_node(index: int, **fields: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for key, value in fields.items():
            setattr(model.graph.node[index], key, value)

    return edit


def replace_node(index: int, node: onnx.NodeProto) -> Edit:
    return lambda model: model.graph.node[index].CopyFrom(node)


def external(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def with_subgraph(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("body", helper.make_graph([], "inner", [], [])))


def rename_dimension(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "2*s0"


def inline(model: onnx.ModelProto) -> None:
    external(model, "large").CopyFrom(numpy_helper.from_array(np.ones((8, 64), np.float32), "large"))


def elsewhere(model: onnx.ModelProto) -> None:
    external(model, "large").external_data[0].value = "../other.data"


def add_note(model: onnx.ModelProto) -> None:
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File ...")


def add_function(model: onnx.ModelProto) -> None:
    opset = [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("pkg", "own", [], [], [], opset))


BROKEN: dict[str, tuple[Edit, str]] = {
    "opset": (lambda m: setattr(m.opset_import[0], "version", 22), "{'ai.onnx': 22}"),
    "second domain": (lambda m: m.opset_import.append(helper.make_opsetid("com.microsoft", 1)), "com.microsoft"),
    "function": (add_function, "defines the function own"),
    "operator": (set_node(0, op_type="GatherND"), "n0 is GatherND"),
    "loop": (set_node(0, op_type="Loop"), "n0 is Loop"),
    "foreign operator": (set_node(0, domain="com.microsoft"), "n0 is com.microsoft.MatMul"),
    "subgraph": (with_subgraph, "graph of its own"),
    "4-D attention": (replace_node(1, attention()), "not attention in its 3-D form"),
    "grouped heads": (replace_node(1, attention(q_num_heads=2, kv_num_heads=1)), "3-D form"),
    "causal": (replace_node(1, attention(q_num_heads=2, kv_num_heads=2, is_causal=1)), "causal"),
    "softmax in half": (lambda m: setattr(m.graph.initializer[0], "data_type", 10), "softmax in low precision"),
    "rotation by halves": (
        replace_node(0, helper.make_node("RotaryEmbedding", ["x", "w", "w"], ["h"], name="n0", num_heads=2)),
        "not an interleaved rotary",
    ),
    "other data file": (elsewhere, "lies in '../other.data'"),
    "inline weight": (inline, "large lies in the graph itself"),
    "sparse weight": (lambda m: m.graph.sparse_initializer.add(), "sparse"),
    "dimension": (rename_dimension, "x float32[batch, 2*s0, 8] where x float32[batch, tokens, 8]"),
    "name": (lambda m: setattr(m.graph.output[0], "name", "z"), "z float32"),
    "type": (lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 10), "x float16"),
    "missing input": (lambda m: m.graph.input.pop(), "0 inputs where 1 are documented"),
    "input without effect": (lambda m: m.graph.node[0].input.__setitem__(0, "w"), "x has no effect"),
    "notes": (add_note, "n0 carries notes"),
}


def test_a_good_graph_passes_and_its_nodes_are_counted(tmp_path: Path) -> None:
    assert lint(write(tmp_path), INPUTS, OUTPUTS) == 4


@pytest.mark.parametrize("rule", BROKEN)
def test_a_graph_that_breaks_a_rule_is_refused(tmp_path: Path, rule: str) -> None:
    edit, said = BROKEN[rule]
    with pytest.raises(ExportError) as caught:
        lint(write(tmp_path, edit), INPUTS, OUTPUTS)
    message = str(caught.value)
    assert message.startswith("good.onnx: ") and said in message and "\n" not in message
