"""Lowered attention computes what the canonical one does: float64, torch and ONNX Runtime's own operator say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tmd_engines.lowering import attention_to_multi_head_attention

# batch, heads, head_dim, queries, keys
SIZES = [(1, 2, 16, 7, 7), (2, 4, 32, 80, 80), (1, 4, 32, 80, 32), (2, 3, 8, 5, 61), (1, 12, 128, 300, 512)]


def attention_model(inputs: int = 3, outputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    names = ["q", "k", "v", "mask"][:inputs]
    node = helper.make_node("Attention", names, ["o", "a", "b"][:outputs], **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def draw(batch: int, heads: int, head_dim: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20)
    lengths = {"q": queries, "k": keys, "v": keys}
    return {
        name: rng.normal(size=(batch, length, heads * head_dim)).astype(np.float32) for name, length in lengths.items()
    }


def float64_attention(feeds: dict[str, np.ndarray], heads: int, scale: float) -> np.ndarray:
    q, k, v = (
        x.astype(np.float64).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
        for x in (feeds["q"], feeds["k"], feeds["v"])
    )
    scores = scale * q @ k.swapaxes(2, 3)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    output = weights / weights.sum(-1, keepdims=True) @ v
    return output.swapaxes(1, 2).reshape(feeds["q"].shape)


@pytest.mark.parametrize("stretch", [None, 0.4, 2.0])  # times the default scale
@pytest.mark.parametrize(("batch", "heads", "head_dim", "queries", "keys"), SIZES)
def test_lowered_attention_computes_the_same(
    batch: int, heads: int, head_dim: int, queries: int, keys: int, stretch: float | None
) -> None:
    feeds = draw(batch, heads, head_dim, queries, keys)
    attributes = {"q_num_heads": heads, "kv_num_heads": heads} | (
        {} if stretch is None else {"scale": stretch * head_dim**-0.5}
    )
    model = attention_model(**attributes)
    canonical = run(model, feeds)
    assert attention_to_multi_head_attention(model) == 1
    assert [(node.domain, node.op_type) for node in model.graph.node] == [("com.microsoft", "MultiHeadAttention")]
    lowered = run(model, feeds)
    exact = float64_attention(feeds, heads, (stretch or 1.0) * head_dim**-0.5)
    assert np.abs(lowered - canonical).max() < 1e-5
    assert np.abs(lowered - exact).max() < 1e-5


def test_lowered_attention_is_torch_attention() -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    feeds = draw(2, 4, 32, 80, 32)
    model = attention_model(q_num_heads=4, kv_num_heads=4)
    attention_to_multi_head_attention(model)
    q, k, v = (torch.from_numpy(feeds[name]).unflatten(2, (4, 32)).transpose(1, 2) for name in ("q", "k", "v"))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert np.abs(run(model, feeds) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize(
    "model",
    [
        attention_model(),  # 4-D
        attention_model(q_num_heads=4, kv_num_heads=2),  # grouped heads
        attention_model(q_num_heads=4, kv_num_heads=4, is_causal=1),
        attention_model(q_num_heads=4, kv_num_heads=4, softcap=30.0),
        attention_model(q_num_heads=4, kv_num_heads=4, scale=0.0),
        attention_model(q_num_heads=4, kv_num_heads=4, softmax_precision=10),
        attention_model(q_num_heads=4, kv_num_heads=4, something_new=1),
        attention_model(inputs=4, q_num_heads=4, kv_num_heads=4),  # mask
        attention_model(outputs=3, q_num_heads=4, kv_num_heads=4),  # keeps keys and values
    ],
    ids=["4-D", "grouped", "causal", "softcap", "scale 0", "half softmax", "unknown", "mask", "cache"],
)
def test_attention_that_is_not_plain_is_left_alone(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    assert attention_to_multi_head_attention(model) == 0
    assert model.SerializeToString() == before


def test_default_attributes_written_out_are_plain() -> None:
    feeds = draw(1, 2, 16, 7, 9)
    model = attention_model(q_num_heads=2, kv_num_heads=2, is_causal=0, softcap=0.0, softmax_precision=1)
    canonical = run(model, feeds)
    assert attention_to_multi_head_attention(model) == 1
    assert np.abs(run(model, feeds) - canonical).max() < 1e-5


def test_graph_without_attention_is_unchanged() -> None:
    node = helper.make_node("Relu", ["q"], ["o"])
    model = attention_model()
    model.graph.node[0].CopyFrom(node)
    before = model.SerializeToString()
    assert attention_to_multi_head_attention(model) == 0
    assert model.SerializeToString() == before
