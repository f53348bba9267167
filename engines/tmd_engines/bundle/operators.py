"""What a graph of a bundle may be made of: operators that tmd-export writes, with their attributes, and plain tensors.

All of them are of the standard domain and known to every engine (ONNX Runtime, OpenVINO, TensorRT 10.15 and newer), and
none is control flow: what a graph asks of memory and time can be told before it runs. The C++ library has the same
table (`runtime/cpp/tools/make_onnx_schema.py` writes it).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ..errors import quote

if TYPE_CHECKING:
    import onnx

PLAIN_ATTENTION = {"is_causal": 0, "qk_matmul_output_mode": 0, "softcap": 0.0, "softmax_precision": 1}
"""What an `Attention` may say besides its heads and scale if it is softmax(scale q k^T) v and no more."""

_CONVOLUTION = "auto_pad dilations group kernel_shape pads strides"

OPERATORS: dict[str, frozenset[str]] = {
    name: frozenset(attributes.split())
    for name, attributes in {
        "Abs": "",
        "Add": "",
        "Attention": "kv_num_heads q_num_heads scale softmax_precision",
        "Cast": "to",
        "Clip": "",
        "Concat": "axis",
        "Conv": _CONVOLUTION,
        "ConvTranspose": _CONVOLUTION,
        "Cos": "",
        "DequantizeLinear": "axis block_size output_dtype",
        "Div": "",
        "Expand": "",
        "Gather": "axis",
        "Gelu": "approximate",
        "Gemm": "alpha beta transA transB",
        "Identity": "",
        "LayerNormalization": "axis epsilon stash_type",
        "MatMul": "",
        "Mul": "",
        "Pad": "mode",
        "Pow": "",
        "QuantizeLinear": "axis block_size output_dtype saturate",
        "RMSNormalization": "axis epsilon stash_type",
        "Range": "",
        "Reciprocal": "",
        "ReduceMax": "keepdims noop_with_empty_axes",
        "ReduceMean": "keepdims noop_with_empty_axes",
        "ReduceSum": "keepdims noop_with_empty_axes",
        "Relu": "",
        "Reshape": "allowzero",
        "RotaryEmbedding": "interleaved num_heads rotary_embedding_dim",
        "Round": "",
        "Shape": "end start",
        "Sigmoid": "",
        "Sin": "",
        "Slice": "",
        "Softmax": "axis",
        "Split": "axis num_outputs",
        "Sqrt": "",
        "Squeeze": "",
        "Sub": "",
        "Sum": "",
        "Tanh": "",
        "Transpose": "perm",
        "Unsqueeze": "",
    }.items()
}
"""Operator -> attributes that it may have."""

TENSOR_BITS = {1: 32, 2: 8, 3: 8, 6: 32, 7: 64, 9: 8, 10: 16, 16: 16, 17: 8, 23: 4}
"""TensorProto's number of a type of weights -> bits of a value: float32, uint8, int8, int32, int64, bool, float16,
bfloat16, float8 (E4M3FN), float4 (E2M1, two values in a byte)."""

_TYPES = {1: "f", 2: "i", 3: "s", 7: "ints"}  # AttributeProto's types that such attributes have, and their field
_TENSOR_FIELDS = {"dims", "data_type", "name", "raw_data", "external_data", "data_location"}


def check_operators(model: onnx.ModelProto) -> str | None:
    """Why the graph may not be run; None: it is made of nothing else."""
    graph = model.graph
    if [entry.domain for entry in model.opset_import] not in ([""], ["ai.onnx"]):
        return "it imports other operators than the standard ones"
    if graph.sparse_initializer or graph.quantization_annotation or model.training_info:
        return "it has sparse weights or training information"
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            shown = ".".join(filter(None, (node.domain, node.op_type)))
            return f"node {quote(node.name)} is {quote(shown)}, which no graph of a bundle needs"
        names = [attribute.name for attribute in node.attribute]
        if len(set(names)) != len(names) or not OPERATORS[node.op_type].issuperset(names):
            return f"node {quote(node.name)} ({node.op_type}) has an attribute that no graph of a bundle needs"
        if not all(map(_is_plain, node.attribute)):
            return f"node {quote(node.name)} ({node.op_type}) has an attribute that is not a number, a word or numbers"
    for tensor in graph.initializer:
        problem = _weight_problem(tensor)
        if problem:
            return f"weight {quote(tensor.name)} {problem}"
    return None


def _is_plain(attribute: onnx.AttributeProto) -> bool:
    """A number, a word or numbers, and nothing beside it."""
    fields = {field.name for field, _ in attribute.ListFields()}
    return attribute.type in _TYPES and fields <= {"name", "type", _TYPES[attribute.type]}


def _weight_problem(tensor: onnx.TensorProto) -> str | None:
    bits = TENSOR_BITS.get(tensor.data_type)
    if bits is None:
        return f"has the type {tensor.data_type}, which no graph of a bundle has"
    if any(size < 0 for size in tensor.dims) or len(tensor.dims) > 8:
        return "has an impossible shape"
    if tensor.HasField("segment"):
        return "is a piece of another"
    if not {field.name for field, _ in tensor.ListFields()} <= _TENSOR_FIELDS:
        return "keeps values in other forms than bytes"
    entries = {entry.key: entry.value for entry in tensor.external_data}
    have = int(entries.get("length", "0")) if entries else len(tensor.raw_data)
    need, rest = divmod(prod(tensor.dims) * bits, 8)
    if rest:
        return "ends in half a byte"
    if have != need:
        return f"has {have} bytes, and its shape and type take {need}"
    return None
