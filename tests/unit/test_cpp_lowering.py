"""ONNX Runtime gets the same graph from C++ as from Python, message by message."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.cpp_tools import twin
from tests.unit.test_lowering import NOT_PLAIN, attention_model, low_precision_model
from tmd_engines.lowering import attention_to_multi_head_attention, low_precision_to_float32
from tmd_runtime.pipeline import BUILT_IN


def low_attention() -> onnx.ModelProto:
    """Attention, sizes and a cast between low types on tensors of low precision, with shapes written down."""
    model = attention_model(q_num_heads=4, kv_num_heads=4, softmax_precision=1, scale=0.3)
    nodes = [helper.make_node("Cast", [f"{name}.full"], [name], to=TensorProto.BFLOAT16) for name in "qkv"]
    attention = model.graph.node[0]
    attention.name, attention.doc_string, attention.output[0] = "attention", "kept as it is", "low"
    more = [
        helper.make_node("Shape", ["low"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["tokens"]),
        helper.make_node("Cast", ["low"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Split", ["half"], ["left", ""], num_outputs=2),
        helper.make_node("Cast", ["left"], ["o"], to=TensorProto.FLOAT),
    ]
    for value in model.graph.input:
        value.name += ".full"
    model.graph.value_info.append(helper.make_tensor_value_info("low", TensorProto.BFLOAT16, ["b", "n", 128]))
    nodes += [*model.graph.node, *more]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def put_leaves_last(model: onnx.ModelProto) -> None:
    """Nodes that nothing reads behind all others, those that wait longest first."""
    nodes = [copy.deepcopy(node) for node in model.graph.node]
    read = {name for node in nodes for name in node.input}
    made_by = {name: index for index, node in enumerate(nodes) for name in node.output}

    def place(node: onnx.NodeProto) -> tuple[bool, int]:
        is_leaf = not read.intersection(node.output)
        return is_leaf, -max((made_by.get(name, -1) for name in node.input), default=-1) if is_leaf else 0

    del model.graph.node[:]
    model.graph.node.extend(sorted(nodes, key=place))


MODELS = {
    **NOT_PLAIN,
    "plain": attention_model(q_num_heads=4, kv_num_heads=4),
    "plain in words": attention_model(q_num_heads=2, kv_num_heads=2, is_causal=0, softcap=0.0, scale=-1.5),
    "one head count": attention_model(q_num_heads=3),
    "bf16": low_precision_model(TensorProto.BFLOAT16),
    "fp16": low_precision_model(TensorProto.FLOAT16),
    "attention in bf16": low_attention(),
    **{path.stem: onnx.load(path, load_external_data=False) for path in sorted(Path(BUILT_IN).glob("*.onnx"))},
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_same_graph_is_lowered_to_the_same_graph(model: onnx.ModelProto) -> None:
    answer = twin().ask("lower", model=model.SerializeToString().hex())
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    low_precision_to_float32(expected)
    attention_to_multi_head_attention(expected)
    put_leaves_last(expected)
    assert onnx.ModelProto.FromString(bytes.fromhex(answer["ok"])) == expected
