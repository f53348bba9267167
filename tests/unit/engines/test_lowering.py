"""Lowered graphs compute what the canonical ones do: float64, torch and ONNX Runtime's own operators say so."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tests.helpers.lowering_models import (
    BROKEN_CASTS,
    LOW_PRODUCTS,
    NOT_PLAIN,
    attention_model,
    cached_model,
    low_precision_model,
    quantized_model,
)
from tmd_engines import BundleError
from tmd_engines.onnxruntime.lowering import (
    attention_to_multi_head_attention,
    lean_order,
    low_precision_to_float32,
    signed_to_unsigned_activations,
    widens_in_products,
)

# batch, heads, head_dim, queries, keys
SIZES = [(1, 2, 16, 7, 7), (2, 4, 32, 80, 80), (1, 4, 32, 80, 32), (2, 3, 8, 5, 61), (1, 12, 128, 300, 512)]


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


@pytest.mark.parametrize("model", NOT_PLAIN.values(), ids=NOT_PLAIN)
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


@pytest.mark.parametrize("low", [TensorProto.BFLOAT16, TensorProto.FLOAT16], ids=["bf16", "fp16"])
def test_low_precision_runs_in_float32_and_rounds_where_torch_does_only_if_asked(low: int) -> None:
    torch = pytest.importorskip("torch", reason="torch is the oracle of this test")
    dtypes: dict[int, Any] = {TensorProto.BFLOAT16: torch.bfloat16, TensorProto.FLOAT16: torch.float16}
    dtype = dtypes[low]
    x = np.random.default_rng(5).normal(size=(2, 50, 64)).astype(np.float32)
    model = low_precision_model(low)
    w, b = (
        torch.from_numpy(onnx.numpy_helper.to_array(tensor).astype(np.float32))
        for tensor in model.graph.initializer[:2]
    )

    def expected(round_to: Any) -> Any:
        def stored(value: Any) -> Any:
            return value.to(round_to).float()

        product = stored(stored(torch.from_numpy(x)) @ w)
        return stored(torch.nn.functional.gelu(stored(product + b), approximate="tanh")).reshape(2, 50, 4, 12).numpy()

    exact, rounded = onnx.ModelProto(), onnx.ModelProto()
    exact.CopyFrom(model), rounded.CopyFrom(model)
    assert low_precision_to_float32(exact) == low_precision_to_float32(rounded, rounding=True) == 2
    onnx.checker.check_model(exact, full_check=True)
    step = torch.finfo(dtype).eps
    assert np.abs(run(exact, {"x": x}) - expected(torch.float32)).max() < 1e-5
    found, wanted = run(rounded, {"x": x}), expected(dtype)
    assert np.abs(found - expected(torch.float32)).max() > step / 4
    assert np.abs(found - wanted).max() <= 4 * step  # sums in another order round the other way now and then,
    assert np.mean(found != wanted) < 0.02  # but rarely


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("low", [TensorProto.FLOAT16, TensorProto.BFLOAT16], ids=["fp16", "bf16"])
def test_caches_in_16_bits_are_widened_where_they_come_in_and_narrowed_where_they_go_out(
    low: int, rounding: bool
) -> None:
    model = cached_model(low)
    low_precision_to_float32(model, rounding)
    onnx.checker.check_model(model, full_check=True)
    x = np.array([[1.0, -2.5, 1 / 3, 1e-3, 1e-6, 3e4, 0, 7]], np.float32)
    cache = np.array([[0.5, 1 / 3, -4, 2e-7, 1e4, 0, -0.0, 1]], np.float16)
    stored = (lambda value: value.astype(helper.tensor_dtype_to_np_dtype(low))) if rounding else (lambda value: value)
    joined = np.concatenate([stored(cache.astype(np.float32)), stored(x)]).astype(np.float32)
    wanted = stored(2 * joined).astype(np.float16)
    y, cache_next = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x, "cache": cache})
    assert cache_next.dtype == np.float16 and np.array_equal(cache_next, wanted)
    assert np.array_equal(y.astype(np.float16), wanted)


def test_attention_in_low_precision_is_lowered_too() -> None:
    feeds = draw(1, 4, 32, 40, 60)
    model = attention_model(q_num_heads=4, kv_num_heads=4, softmax_precision=1)
    for name in "qkv":
        model.graph.node.insert(0, helper.make_node("Cast", [f"{name}.full"], [name], to=TensorProto.BFLOAT16))
    for value in model.graph.input:
        value.name += ".full"
    model.graph.node[-1].output[0] = "low"
    model.graph.node.append(helper.make_node("Cast", ["low"], ["o"], to=TensorProto.FLOAT))
    low_precision_to_float32(model)
    assert attention_to_multi_head_attention(model) == 1
    found = run(model, {f"{name}.full": value for name, value in feeds.items()})
    assert np.abs(found - float64_attention(feeds, 4, 32**-0.5)).max() < 1e-5


def test_graph_in_float32_is_unchanged() -> None:
    model = attention_model(q_num_heads=4, kv_num_heads=4)
    before = model.SerializeToString()
    assert low_precision_to_float32(model) == 0
    assert model.SerializeToString() == before


@pytest.mark.parametrize("model", BROKEN_CASTS.values(), ids=BROKEN_CASTS)
def test_cast_that_does_not_say_to_what_is_an_error_of_the_bundle(model: onnx.ModelProto) -> None:
    with pytest.raises(BundleError, match=r"^b\.onnx: node Cast 'odd' does not say which type it converts to\. Make"):
        low_precision_to_float32(model, where="b.onnx")


@pytest.mark.parametrize("raw", [False, True])
def test_only_a_zero_point_of_0_becomes_one_of_128(raw: bool) -> None:
    model = quantized_model(raw=raw)
    x = np.array([-1.0, -0.013, 0.5, 9.0], np.float32)
    expected = run(model, {"x": x})
    assert signed_to_unsigned_activations(model) == 1
    np.testing.assert_array_equal(run(model, {"x": x}), expected)
    for other in (quantized_model(zero=3, raw=raw), quantized_model(dims=(1,), raw=raw)):
        before = other.SerializeToString()
        assert signed_to_unsigned_activations(other) == 0
        assert other.SerializeToString() == before


@pytest.mark.parametrize(("model", "expected"), LOW_PRODUCTS.values(), ids=LOW_PRODUCTS)
def test_only_large_weights_of_products_stay_in_16_bits(model: onnx.ModelProto, expected: bool) -> None:
    lowered = copy.deepcopy(model)
    low_precision_to_float32(lowered)
    assert widens_in_products(lowered) is expected


def test_what_nobody_reads_comes_last_and_the_one_that_can_run_first_at_the_very_end() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["early"]),
        helper.make_node("Abs", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["later"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Exp", ["b"], ["y"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    lean_order(model)
    assert [node.output[0] for node in model.graph.node] == ["a", "b", "y", "later", "early"]
