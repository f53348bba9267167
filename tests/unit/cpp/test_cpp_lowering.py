"""ONNX Runtime gets the same graph from C++ as from Python, message by message."""

from __future__ import annotations

import copy
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from tests.helpers.cpp_tools import BUNDLE, twin
from tests.helpers.lowering_models import (
    BROKEN_CASTS,
    BROKEN_FLOAT4,
    LOW_PRODUCTS,
    NOT_PLAIN,
    attention_model,
    cached_model,
    low_precision_model,
    quantized_model,
)
from tests.helpers.synthetic_quantized import quantized_models
from tmd_engines import BundleError
from tmd_engines.onnxruntime.engine import fast_unsigned_products
from tmd_engines.onnxruntime.float4 import float4_to_float8
from tmd_engines.onnxruntime.lowering import (
    attention_to_multi_head_attention,
    lean_order,
    low_precision_to_float32,
    signed_to_unsigned_activations,
    widens_in_products,
)
from tmd_runtime.built_in import BUILT_IN


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


MODELS = {
    **NOT_PLAIN,
    "plain": attention_model(q_num_heads=4, kv_num_heads=4),
    "plain in words": attention_model(q_num_heads=2, kv_num_heads=2, is_causal=0, softcap=0.0, scale=-1.5),
    "one head count": attention_model(q_num_heads=3),
    "bf16": low_precision_model(TensorProto.BFLOAT16),
    "fp16": low_precision_model(TensorProto.FLOAT16),
    "attention in bf16": low_attention(),
    "caches beside bf16": cached_model(TensorProto.BFLOAT16),
    "caches in fp16": cached_model(TensorProto.FLOAT16),
    "caches that nothing reads": cached_model(TensorProto.BFLOAT16, reads=False),
    **{name: model for name, (model, _) in LOW_PRODUCTS.items()},
    "zero point": quantized_model(),
    "zero point, raw": quantized_model(raw=True),
    "another zero point": quantized_model(zero=3, raw=True),
    "zero points of a channel": quantized_model(dims=(1,)),
    **{
        f"{name} in {kind}": model
        for kind in ("int8", "fp8", "nvfp4")
        for name, model in quantized_models(kind).items()
    },
    **{path.stem: onnx.load(path, load_external_data=False) for path in sorted(Path(BUILT_IN).glob("*.onnx"))},
}


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_same_graph_is_lowered_to_the_same_graph(model: onnx.ModelProto, unsigned: bool) -> None:
    answer = twin().ask("lower", model=model.SerializeToString().hex(), unsigned=unsigned)
    expected = onnx.ModelProto()
    expected.CopyFrom(model)
    float4_to_float8(expected)
    low_precision_to_float32(expected)
    attention_to_multi_head_attention(expected)
    if unsigned:
        signed_to_unsigned_activations(expected)
    lean_order(expected)
    assert onnx.ModelProto.FromString(bytes.fromhex(answer["ok"])) == expected
    assert answer["widens"] == widens_in_products(expected)


@pytest.mark.parametrize("model", BROKEN_CASTS.values(), ids=BROKEN_CASTS)
def test_broken_casts_are_refused_with_the_same_words(model: onnx.ModelProto) -> None:
    answer = twin().ask("lower", model=model.SerializeToString().hex())
    with pytest.raises(BundleError) as refused:
        low_precision_to_float32(model, where="it.onnx")
    assert (answer["status"], answer["error"]) == (BUNDLE, str(refused.value))


@pytest.mark.parametrize("model", BROKEN_FLOAT4.values(), ids=BROKEN_FLOAT4)
def test_float4_in_another_form_is_refused_with_the_same_words(model: onnx.ModelProto) -> None:
    answer = twin().ask("lower", model=model.SerializeToString().hex())
    with pytest.raises(BundleError) as refused:
        float4_to_float8(copy.deepcopy(model), where="it.onnx")
    assert (answer["status"], answer["error"]) == (BUNDLE, str(refused.value))


def test_both_ask_this_processor_the_same() -> None:
    assert twin().ask("fast_unsigned")["ok"] == fast_unsigned_products()
