"""What a graph costs: operations counted from its products, and the memory of what lies between its nodes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, quote
from ..holding import ONNXRUNTIME, WIDENED_BYTES, Holding
from .shapes import ShapedGraph, Tensor

if TYPE_CHECKING:
    import onnx

# Operators whose work cannot be told from the shapes around them by the rules below.
_UNCOUNTABLE = frozenset({"DeformConv", "Einsum", "GRU", "If", "LSTM", "Loop", "RNN", "Scan"})
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})  # the output is the input's memory
# What these make of weights alone takes the place of the weights, and is counted with them.
_WEIGHT_FORMS = _VIEWS | {"Cast", "DequantizeLinear", "Transpose"}


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


def weight_bytes(graph: ShapedGraph, holding: Holding = ONNXRUNTIME) -> int:
    """What an engine on a CPU holds of the weights, in bytes.

    A table of which a run reads single rows (the token embedding) stays in its file if it is float32.
    """
    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        for index, name in enumerate(node.input):
            readers.setdefault(name, set()).add(node.op_type if index == 0 else "")
    stored = widened_in_products(graph) if holding.keeps_products else frozenset()

    def held(weight: Tensor) -> int:
        return _held(weight, holding) * (holding.float16_weights if _is_float16(weight) else 1)

    return sum(
        graph.tensors[name].nbytes if name in stored else held(graph.tensors[name])
        for name in graph.weights
        if readers.get(name) != {"Gather"} or graph.tensors[name].itemsize < 4
    )


def widened_in_products(graph: ShapedGraph) -> frozenset[str]:
    """The large weights of 16 bits of a graph in which only products of matrices read them; else none."""
    large = {
        name
        for name in graph.weights
        if _is_low(graph.tensors[name]) and 4 * graph.tensors[name].elements > WIDENED_BYTES
    }
    readers = {node.op_type for node in graph.nodes for name in node.input if name in large}
    return frozenset(large) if readers <= {"MatMul", "Gemm"} else frozenset()


def peak_activation_bytes(graph: ShapedGraph, holding: Holding = ONNXRUNTIME) -> int:
    """The most memory that an engine on a CPU needs between inputs and outputs of the graph, in bytes.

    Found by running through the nodes in the file's order, where each tensor is freed after its last reader; views take
    no memory, and what follows from weights alone is computed when the graph is loaded. On top come the arena's share,
    and the inputs where the engine copies them.
    """
    copied = sum(graph.tensors[name].nbytes for name in graph.inputs) if holding.copies_inputs else 0
    return int(holding.arena * _Liveness(graph, holding).peak()) + copied


class _Liveness:
    """Which tensors are in memory after which node. A tensor belongs to a *storage*, named after its first tensor."""

    def __init__(self, graph: ShapedGraph, holding: Holding) -> None:
        self._graph, self._holding = graph, holding
        self._widened = widened_in_products(graph) if holding.keeps_products else frozenset()
        self._last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.input if name}
        self._constants = set(graph.weights)
        self._folded = 0  # bytes of what is computed from weights alone, and stays
        self._elsewhere = self._in_buffers()
        self._to_widen = {*graph.inputs} - self._elsewhere
        self._storage: dict[str, str] = {}
        self._bytes: dict[str, int] = {}  # of the storages in memory
        self._end: dict[str, int] = {}  # storage -> index of the last node that needs it

    def peak(self) -> int:
        peak = 0
        for index, node in enumerate(self._graph.nodes):
            if all(name in self._constants for name in node.input if name):
                self._constants.update(node.output)
                if node.op_type not in _WEIGHT_FORMS:  # whose values are counted as weights
                    self._folded += sum(self._held(self._graph.tensors[name]) for name in node.output if name)
                continue
            for name in self._to_widen & {*node.input}:  # a copy, made for its first reader
                self._to_widen.discard(name)
                self._hold(name, name, index)
            for name in node.output:
                if name and name not in self._elsewhere:
                    self._hold(name, self._viewed(node, name) or name, index)
            peak = max(peak, sum(self._bytes.values()) + self._scratch(node))
            for storage in [storage for storage in self._bytes if self._end[storage] <= index]:
                del self._bytes[storage]
        return peak + self._folded

    def _in_buffers(self) -> set[str]:
        """The inputs and outputs that nodes read and write in the runtime's buffers themselves.

        An engine that does not copy all inputs has a wide copy of each that it must convert; only a `Cast` writes its
        output there.
        """
        graph = self._graph
        ends = {*graph.inputs, *graph.outputs}
        if self._holding.copies_inputs:
            return ends
        cast = {node.output[0] for node in graph.nodes if node.op_type == "Cast"} - self._last_use.keys()
        return {name for name in ends if name in cast or not _is_widened(graph.tensors[name], self._holding)}

    def _hold(self, name: str, storage: str, index: int) -> None:
        self._storage[name] = storage
        self._bytes.setdefault(storage, self._held(self._graph.tensors[name]))
        self._end[storage] = max(self._end.get(storage, index), self._last_use.get(name, index))

    def _viewed(self, node: onnx.NodeProto, name: str) -> str | None:
        """The storage in memory that the output `name` only gives another shape, if any."""
        first = self._storage.get(node.input[0], "") if node.input else ""
        # Casts between floats are none where both are float32 in memory.
        is_view = node.op_type in _VIEWS or (
            node.op_type == "Cast" and self._bytes.get(first) == self._held(self._graph.tensors[name])
        )
        return first if is_view and first in self._bytes else None

    def _scratch(self, node: onnx.NodeProto) -> int:
        """What the kernel allocates for itself while the node runs, where that counts."""
        tensors = self._graph.tensors
        if node.op_type in ("MatMul", "Gemm"):
            return sum(_held(tensors[name], self._holding) for name in node.input if name in self._widened)
        if node.op_type == "Attention" and not any(node.input[3:]):
            # As MultiHeadAttention (lowering.py): q, k and v once more, with the rows of each head together.
            return sum(self._held(tensors[name]) for name in node.input[:3])
        if node.op_type == "Attention":  # with a mask: all scores, before and after softmax; the mask has their size
            heads = _attribute(node, "q_num_heads") or tensors[node.input[0]].shape[1]
            query, key = tensors[node.input[0]].shape, tensors[node.input[1]].shape
            return 2 * 4 * query[0] * int(heads) * query[-2] * key[-2]
        if node.op_type == "Gelu" and _attribute(node, "approximate", b"none") == b"tanh":
            return self._held(tensors[node.output[0]])
        if node.op_type == "Conv" and len(tensors[node.input[0]].shape) == 4:
            # Blocks of channels side by side (NCHWc): a copy of the input, and one of the output.
            return self._held(tensors[node.input[0]]) + self._held(tensors[node.output[0]])
        return 0

    def _held(self, tensor: Tensor) -> int:
        return _held(tensor, self._holding)


def _held(tensor: Tensor, holding: Holding) -> int:
    """Bytes of a tensor in the engine's memory."""
    return tensor.elements * (4 if _is_widened(tensor, holding) else tensor.itemsize)


def _is_widened(tensor: Tensor, holding: Holding) -> bool:
    return _is_float16(tensor) or (holding.widens_bfloat16 and _is_low(tensor))


def _is_float16(tensor: Tensor) -> bool:
    from onnx import TensorProto

    return bool(tensor.dtype == TensorProto.FLOAT16)


def _is_low(tensor: Tensor) -> bool:
    from onnx import TensorProto

    return tensor.dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
