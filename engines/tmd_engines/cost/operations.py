"""What a graph costs: operations counted from its products, and the memory of what lies between its nodes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, quote
from .shapes import ShapedGraph, Tensor

if TYPE_CHECKING:
    import onnx

# Operators whose work cannot be told from the shapes around them by the rules below.
_UNCOUNTABLE = frozenset({"DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan"})
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})  # the output is the input's memory
# What these make of weights alone takes the place of the weights, and is counted with them.
_WEIGHT_FORMS = _VIEWS | {"Cast", "DequantizeLinear", "Transpose"}
_WEIGHT_FORMS = frozenset(
    {"Cast", "DequantizeLinear", "Transpose", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
)
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})  # the output is the input's memory
# What ONNX Runtime's arena takes from the system, against the tensors in it at the peak: pieces that are freed do not
# fit what comes next. Measured from 1.3 (text encoder) to 1.5 (transformer), see docs/wan.md.
ARENA = 1.5


def flops(graph: ShapedGraph, where: str) -> int:
    """Floating point operations of one run: two for each multiply-add of a product, convolution or attention.

    What is done once per element (norms, activations, softmax, sums) is not counted; in these models it is below 1 %.
    Raises BundleError for an operator that has products but no rule here.
    """
    total = 0
    for node in graph.nodes:
        if node.op_type in _UNCOUNTABLE:
            raise BundleError(
                f"{where} cannot be sized: there is no rule for the operations of {node.op_type} {quote(node.name)}. "
                "Export the graph with the newest tmd-export."
            )
        rule = _MULTIPLY_ADDS.get(node.op_type)
        if rule is not None:
            ins = [graph.tensors[name] if name else None for name in node.input]
            total += 2 * rule(node, ins, graph.tensors[node.output[0]])
    return total


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _matmul(node: onnx.NodeProto, ins: list[Any], out: Tensor) -> int:
    return out.elements * int(ins[0].shape[-1])


def _gemm(node: onnx.NodeProto, ins: list[Any], out: Tensor) -> int:
    return out.elements * int(ins[0].shape[0 if _attribute(node, "transA", 0) else 1])


def _conv(weight: int) -> Callable[[onnx.NodeProto, list[Any], Tensor], int]:
    """Every output element is a sum over the input channels of its group and over the kernel: weight[0]."""
    return lambda node, ins, out: out.elements * prod(ins[weight].shape[1:])


def _conv_transpose(node: onnx.NodeProto, ins: list[Any], out: Tensor) -> int:
    return int(ins[0].elements) * prod(ins[1].shape[1:])  # every input element goes to weight[0]


def _attention(node: onnx.NodeProto, ins: list[Any], out: Tensor) -> int:
    """q·k over the width of q, then scores·v, whose width is that of the output; all heads together."""
    query, key = ins[0], ins[1]
    keys = key.shape[-2] + (ins[4].shape[-2] if len(ins) > 4 and ins[4] is not None else 0)  # past_key comes on top
    return (query.elements + out.elements) * int(keys)


_MULTIPLY_ADDS: dict[str, Callable[[onnx.NodeProto, list[Any], Tensor], int]] = {
    "Attention": _attention,
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _conv(3),
    "QLinearMatMul": _matmul,
}


def weight_bytes(graph: ShapedGraph) -> int:
    """What ONNX Runtime on a CPU holds of the weights, in bytes: those in low precision become float32.

    A table of which a run reads single rows (the token embedding) stays in its file if it is float32.
    """
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            readers.setdefault(name, set()).add(node.op_type if index == 0 else "")
    return sum(
        _held(graph.tensors[name])
        for name in graph.weights
        if readers.get(name) != {"Gather"} or graph.tensors[name].itemsize < 4
    )


def peak_activation_bytes(graph: ShapedGraph) -> int:
    """The most memory that ONNX Runtime on a CPU needs between inputs and outputs of the graph, in bytes.

    Found by running through the nodes in the file's order, where each tensor is freed after its last reader; views take
    no memory, and what follows from weights alone is computed when the graph is loaded. On top comes `ARENA`.
    """
    return int(ARENA * _Liveness(graph).peak())


class _Liveness:
    """Which tensors are in memory after which node. A tensor belongs to a *storage*, named after its first tensor."""

    def __init__(self, graph: ShapedGraph) -> None:
        self._graph = graph
        self._last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.input if name}
        self._constants = set(graph.weights)
        self._folded = 0  # bytes of what is computed from weights alone, and stays
        self._elsewhere = {*graph.inputs, *graph.outputs}
        self._storage: dict[str, str] = {}
        self._bytes: dict[str, int] = {}  # of the storages in memory
        self._end: dict[str, int] = {}  # storage -> index of the last node that needs it

    def peak(self) -> int:
        peak = 0
        for index, node in enumerate(self._graph.nodes):
            if all(name in self._constants for name in node.input if name):
                self._constants.update(node.output)
                if node.op_type not in _WEIGHT_FORMS:  # whose values are counted as weights
                    self._folded += sum(_held(self._graph.tensors[name]) for name in node.output if name)
                continue
            for name in node.output:
                if name and name not in self._elsewhere:
                    self._place(node, name, index)
            peak = max(peak, sum(self._bytes.values()) + self._scratch(node))
            for storage in [storage for storage in self._bytes if self._end[storage] <= index]:
                del self._bytes[storage]
        return peak + self._folded

    def _place(self, node: onnx.NodeProto, name: str, index: int) -> None:
        storage = self._viewed(node, name) or name
        self._storage[name] = storage
        self._bytes.setdefault(storage, _held(self._graph.tensors[name]))
        self._end[storage] = max(self._end.get(storage, index), self._last_use.get(name, index))

    def _viewed(self, node: onnx.NodeProto, name: str) -> str | None:
        """The storage in memory that the output `name` only gives another shape, if any."""
        first = self._storage.get(node.input[0], "") if node.input else ""
        # Casts between floats are none where all floats are float32.
        is_view = node.op_type in _VIEWS or (
            node.op_type == "Cast" and self._bytes.get(first) == _held(self._graph.tensors[name])
        )
        return first if is_view and first in self._bytes else None

    def _scratch(self, node: onnx.NodeProto) -> int:
        """What the kernel allocates for itself while the node runs, where that counts."""
        tensors = self._graph.tensors
        if node.op_type == "Attention" and not any(node.input[3:]):
            # As MultiHeadAttention (lowering.py): q, k and v once more, with the rows of each head together.
            return sum(_held(tensors[name]) for name in node.input[:3])
        if node.op_type == "Attention":  # with a mask: all scores, before and after softmax; the mask has their size
            heads = _attribute(node, "q_num_heads") or tensors[node.input[0]].shape[1]
            query, key = tensors[node.input[0]].shape, tensors[node.input[1]].shape
            return 2 * 4 * query[0] * int(heads) * query[-2] * key[-2]
        if node.op_type == "Gelu" and _attribute(node, "approximate", b"none") == b"tanh":
            return _held(tensors[node.output[0]])
        if node.op_type == "Conv" and len(tensors[node.input[0]].shape) == 4:
            # Blocks of channels side by side (NCHWc): a copy of the input, and one of the output.
            return _held(tensors[node.input[0]]) + _held(tensors[node.output[0]])
        return 0


def _held(tensor: Tensor) -> int:
    """Bytes of a tensor in ONNX Runtime on a CPU, which computes every float in float32."""
    from onnx import TensorProto

    low = tensor.dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    return tensor.elements * (4 if low else tensor.itemsize)
