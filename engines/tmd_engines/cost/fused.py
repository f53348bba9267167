"""The scratch memory that a graph needs with TensorRT, told before it is built: what lies between its kernels.

A rule of thumb that was held against the builder's own figures (docs/engines.md): in transformers every tensor between
two nodes is in memory, in the type that it has, but for the scores of attention, which has a kernel of its own; in
autoencoders the arithmetic after a convolution becomes part of its kernel, and what is between takes no memory.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle.float4 import FLOAT4
from .shapes import ShapedGraph

MARGIN = 1.2  # the builder's order of the nodes is another; the figures of 1.3B and 14B lie on both sides of this
WORKSPACE = 8_200_000  # what the builder asks for in the smallest graph with a product
_VIEWS = frozenset(("Expand", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"))
_CONVOLUTIONS = frozenset(("Conv", "ConvTranspose"))
_BETWEEN = frozenset(("Add", "Cast", "DequantizeLinear", "Div", "Mul", "QuantizeLinear", "Where"))
_PRODUCTS = _CONVOLUTIONS | {"Attention", "Gemm", "MatMul"}
_ALONE = _PRODUCTS | {"LayerNormalization", "ReduceMean", "ReduceSum", "Resize", "RMSNormalization", "Softmax"}


def scratch_bytes(graph: ShapedGraph) -> int:
    """The peak of what is in memory at once, without inputs, outputs and weights."""
    kinds = {node.op_type for node in graph.nodes}
    readers: dict[str, list[int]] = {}
    root: dict[str, str] = {}  # tensor -> the one whose memory it is seen in
    end: dict[str, int] = {}  # memory -> index of the last node that reads it
    for index, node in enumerate(graph.nodes):
        for name in filter(None, node.input):
            readers.setdefault(name, []).append(index)
            end[root.get(name, name)] = index
        if node.op_type in _VIEWS and node.input:
            root |= dict.fromkeys(node.output, root.get(node.input[0], node.input[0]))
    constants, elsewhere = set(graph.weights), {*graph.inputs, *graph.outputs}
    inside = _inside_attention(graph, readers) | _unpacked(graph) | _inside_blocks(graph)
    if kinds & _CONVOLUTIONS:
        inside |= _inside_kernels(graph, readers)
    live: dict[str, int] = {}
    peak = 0
    for index, node in enumerate(graph.nodes):
        if all(name in constants for name in node.input if name):
            constants.update(node.output)
            continue
        for name in filter(None, node.output):
            if root.get(name, name) == name and name not in elsewhere | inside:
                live[name] = graph.tensors[name].nbytes
        peak = max(peak, sum(live.values()))
        live = {name: size for name, size in live.items() if end.get(name, index) > index}
    return int(MARGIN * peak) + (WORKSPACE if kinds & _PRODUCTS else 0)


def _inside_attention(graph: ShapedGraph, readers: Mapping[str, list[int]]) -> set[str]:
    """Scores of attention in primitives, from the product before a softmax to the one after it: in 8 bits it is so."""
    makers = {name: node for node in graph.nodes for name in node.output}
    inside: set[str] = set()
    for node in graph.nodes:
        if node.op_type != "Softmax":
            continue
        name = node.input[0]
        while name in makers and name not in inside:
            inside.add(name)
            name = makers[name].input[0] if makers[name].op_type in _BETWEEN else ""
        ahead = [node.output[0]]
        while ahead:
            name = ahead.pop()
            inside.add(name)
            after = [graph.nodes[index] for index in readers.get(name, []) if graph.nodes[index].op_type in _BETWEEN]
            ahead += [each.output[0] for each in after]
    return inside


def _unpacked(graph: ShapedGraph) -> set[str]:
    """What comes out of 8 bits on the way into a product, which takes the 8 bits."""
    return {name for node in graph.nodes if node.op_type == "DequantizeLinear" for name in node.output}


def _inside_blocks(graph: ShapedGraph) -> set[str]:
    """What lies between an activation and the scales of its blocks in float4: one operator makes both."""
    makers = {name: node for node in graph.nodes for name in node.output}
    inside: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and graph.tensors[node.output[0]].dtype == FLOAT4:
            x, name = node.input[:2]
            while name in makers and name not in inside | {x}:
                scales = makers[name].op_type == "QuantizeLinear"
                inside |= set() if scales else {name}
                name = makers[name].input[0]
    inside |= {node.output[0] for node in graph.nodes if node.op_type == "Cast" and node.input[0] in inside}
    return inside


def _inside_kernels(graph: ShapedGraph, readers: Mapping[str, list[int]]) -> set[str]:
    """Tensors that are read once, by arithmetic that becomes part of the kernel which makes them."""
    return {
        name
        for name, found in readers.items()
        if len(found) == 1 and graph.nodes[found[0]].op_type not in _ALONE | _VIEWS
    }
