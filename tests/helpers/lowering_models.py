"""Small graphs for the lowering to ONNX Runtime, which both hosts are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

# batch, heads, head_dim, queries, keys


def attention_model(inputs: int = 3, outputs: int = 1, **attributes: Any) -> onnx.ModelProto:
    names = ["q", "k", "v", "mask"][:inputs]
    node = helper.make_node("Attention", names, ["o", "a", "b"][:outputs], **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


NOT_PLAIN = {
    "4-D": attention_model(),
    "grouped": attention_model(q_num_heads=4, kv_num_heads=2),
    "causal": attention_model(q_num_heads=4, kv_num_heads=4, is_causal=1),
    "softcap": attention_model(q_num_heads=4, kv_num_heads=4, softcap=30.0),
    "scale 0": attention_model(q_num_heads=4, kv_num_heads=4, scale=0.0),
    "half softmax": attention_model(q_num_heads=4, kv_num_heads=4, softmax_precision=10),
    "unknown": attention_model(q_num_heads=4, kv_num_heads=4, something_new=1),
    "mask": attention_model(inputs=4, q_num_heads=4, kv_num_heads=4),
    "cache": attention_model(outputs=3, q_num_heads=4, kv_num_heads=4),  # keeps keys and values
}


def low_precision_model(low: int) -> onnx.ModelProto:
    """x in float32 -> cast -> product, bias, Gelu, reshape -> cast back; as an exported block does it."""
    rng = np.random.default_rng(4)
    weights = {"w": rng.normal(size=(64, 48)) / 8, "b": rng.normal(size=48)}
    initializers = [
        helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.astype(np.float32).ravel())
        for name, value in weights.items()
    ]
    for tensor in initializers:
        exact = onnx.numpy_helper.to_array(tensor)
        dtype = helper.tensor_dtype_to_np_dtype(low)
        tensor.CopyFrom(onnx.numpy_helper.from_array(exact.astype(dtype), tensor.name))
    shape = onnx.numpy_helper.from_array(np.array([0, 0, 4, 12]), "shape")
    nodes = [
        helper.make_node("Cast", ["x"], ["x.low"], to=low),
        helper.make_node("MatMul", ["x.low", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Gelu", ["sum"], ["gelu"], approximate="tanh"),
        helper.make_node("Reshape", ["gelu", "shape"], ["split"]),
        helper.make_node("Cast", ["split"], ["y"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "tokens", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 4, 12])
    graph = helper.make_graph(nodes, "g", [x], [y], [*initializers, shape])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def cached_model(low: int, reads: bool = True) -> onnx.ModelProto:
    """A graph that keeps a cache in float16: the rows of the cache and of x (float32) are doubled in `low`. They are
    the next cache, and y (float32) is read from it, or else from what it is made of."""
    half = TensorProto.FLOAT16
    before = [] if low == half else [helper.make_node("Cast", ["cache"], ["kept"], to=low)]
    nodes = [
        helper.make_node("Cast", ["x"], ["x.low"], to=low),
        *before,
        helper.make_node("Concat", ["kept" if before else "cache", "x.low"], ["joined"], axis=0),
        helper.make_node("Add", ["joined", "joined"], ["cache_next" if low == half else "doubled"]),
        *([] if low == half else [helper.make_node("Cast", ["doubled"], ["cache_next"], to=half)]),
        helper.make_node("Cast", ["cache_next" if reads else "joined"], ["y"], to=TensorProto.FLOAT),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    cache = helper.make_tensor_value_info("cache", half, ["m", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["k", 8])
    cache_next = helper.make_tensor_value_info("cache_next", half, ["k", 8])
    graph = helper.make_graph(nodes, "g", [x, cache], [y, cache_next])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def low_products(*readers: str, rows: int = 600) -> onnx.ModelProto:
    """A weight in bfloat16, `[rows, 600]` without values, that nodes of these kinds read."""
    nodes = [helper.make_node("Cast", ["x"], ["low"], to=TensorProto.BFLOAT16)]
    nodes += [helper.make_node(kind, ["low", "w"], [f"y{place}"]) for place, kind in enumerate(readers)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])
    ys = [helper.make_tensor_value_info(f"y{place}", TensorProto.BFLOAT16, None) for place in range(len(readers))]
    weight = onnx.TensorProto(name="w", dims=[rows, 600], data_type=TensorProto.BFLOAT16)
    graph = helper.make_graph(nodes, "g", [x], ys, [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


# name -> graph, and whether the weight may stay in 16 bits
LOW_PRODUCTS = {
    "a large weight of products": (low_products("MatMul", "Gemm"), True),
    "a large weight of a convolution": (low_products("Conv"), False),
    "a large weight of more than a product": (low_products("MatMul", "Add"), False),
    "a small weight": (low_products("MatMul", rows=400), False),
}


def cast_model(*attributes: onnx.AttributeProto) -> onnx.ModelProto:
    """One Cast with these attributes."""
    node = onnx.NodeProto(op_type="Cast", name="odd", input=["x"], output=["y"], attribute=attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


BROKEN_CASTS = {
    "without to": cast_model(),
    "to a parameter of a function": cast_model(
        onnx.AttributeProto(name="to", type=onnx.AttributeProto.INT, ref_attr_name="T")
    ),
    "to a word": cast_model(helper.make_attribute("to", "float")),
    "to another name": cast_model(helper.make_attribute("too", 1)),
}


def quantized_model(zero: int = 0, dims: tuple[int, ...] = (), raw: bool = False) -> onnx.ModelProto:
    """x in float32 -> int8 with this zero point -> float32, as the activation of a product."""
    values = [np.array([zero], np.int8).tobytes() if raw else [zero]]
    zero_point = helper.make_tensor("zero", TensorProto.INT8, dims, values[0], raw=raw)
    scale = helper.make_tensor("scale", TensorProto.FLOAT, dims, [0.02])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], [scale, zero_point])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def _float4(*inputs: str, **attributes: int) -> onnx.ModelProto:
    """x quantized to float4 with given scales."""
    given = {"axis": -1, "block_size": 16, **attributes}
    kept: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    node = helper.make_node("QuantizeLinear", ["x", "s", *inputs], ["q"], name="it", output_dtype=23, **kept)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "s")]
    graph = helper.make_graph([node], "g", values, [helper.make_tensor_value_info("q", TensorProto.FLOAT4E2M1, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


BROKEN_FLOAT4 = {
    "another axis": _float4(axis=1),
    "no axis": _float4(axis=None),  # type: ignore[arg-type]
    "blocks of 32": _float4(block_size=32),
    "no blocks": _float4(block_size=0),
    "a zero point": _float4("z"),
}
