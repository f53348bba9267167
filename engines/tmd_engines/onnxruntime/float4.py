"""Tensors in float4 (E2M1) for ONNX Runtime on a CPU, which has no operator for them.

Each becomes a tensor in float8 (E4M3), which holds every value of E2M1. Weights stay in the data file with two values
in a byte, and what takes them apart is part of the graph. Made on the loaded model in memory, never stored in a bundle.
The C++ library makes the same graph, node by node (`runtime/cpp/src/engines/onnxruntime_float4.cpp`).
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.float4 import BLOCK, FLOAT4, FLOAT8, LARGEST, VALUES, block_problem, makes_float4
from ..errors import BundleError, quote

if TYPE_CHECKING:
    import onnx


def float4_to_float8(model: onnx.ModelProto, where: str = "The graph") -> int:
    """Makes every tensor in float4 of the graph one in float8. Returns how many there were.

    `where` names the file in messages. Raises BundleError for a quantization in another form than `bundle.float4` has.
    """
    nodes, changed = _Nodes(), 0
    for weight in model.graph.initializer:
        if weight.data_type == FLOAT4:
            _take_apart(weight, nodes)
            changed += 1
    for node in model.graph.node:
        if not makes_float4(node):
            nodes.made.append(node)
            continue
        problem = block_problem(node)
        if problem:
            raise BundleError(
                f"{where}: node QuantizeLinear {quote(node.name)} {problem}. Make the bundle again with tmd-export, "
                "and do not run graphs from elsewhere."
            )
        _round(node, nodes)
        changed += 1
    if changed:
        made = [type(node).FromString(node.SerializeToString()) for node in nodes.made]  # the list is emptied next
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(made)
        model.graph.initializer.extend(nodes.constants.values())
    return changed


class _Nodes:
    """The nodes of the graph in the making, and the constants that they read."""

    def __init__(self) -> None:
        self.made: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.made.append(helper.make_node(kind, inputs, [output], name=f"float4/{output}", **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        from onnx import numpy_helper

        full = f"float4/{name}"
        self.constants.setdefault(full, numpy_helper.from_array(values, full))
        return full

    def number(self, value: float) -> str:
        return self.constant(f"{value:g}", np.asarray(value, np.float32))


def _take_apart(weight: onnx.TensorProto, nodes: _Nodes) -> None:
    """A weight becomes bytes, and nodes that make of each byte its two values, the one in the low bits first."""
    from onnx import TensorProto

    name, dims = weight.name, list(weight.dims)
    weight.name, weight.data_type, weight.dims[:] = f"{name}.bytes", TensorProto.UINT8, [prod(dims) // 2]
    pairs = np.array([[VALUES[byte & 15], VALUES[byte >> 4]] for byte in range(256)], np.float32)
    shape = nodes.constant(f"shape/{'x'.join(map(str, dims))}", np.array(dims, np.int64))
    codes = nodes.add("Cast", [weight.name], f"{name}.codes", to=TensorProto.INT32)
    both = nodes.add("Gather", [nodes.constant("pairs", pairs), codes], f"{name}.pairs", axis=0)
    values = nodes.add("Reshape", [both, shape], f"{name}.values")
    nodes.add("Cast", [values], name, to=FLOAT8)


def _round(node: onnx.NodeProto, nodes: _Nodes) -> None:
    """x divided by the scales of its blocks, in float32, and rounded to the nearest value of E2M1, ties to even.

    Values are 0.5 apart below 2, 1 apart below 4 and 2 apart below 6, the end. Half of them are even in each part, and
    these are the even multiples.
    """
    from onnx import TensorProto

    (x, scales), name = node.input, node.output[0]
    wide = nodes.add("Cast", [x], f"{name}.wide", to=TensorProto.FLOAT)
    grid = nodes.add("Shape", [scales], f"{name}.grid")
    block = nodes.constant("block", np.array([BLOCK], np.int64))
    blocks = nodes.add("Concat", [grid, block], f"{name}.blocks", axis=0)
    rows = nodes.add("Reshape", [wide, blocks], f"{name}.rows")
    last = nodes.constant("last", np.array([-1], np.int64))
    steps = nodes.add("Unsqueeze", [scales, last], f"{name}.steps")
    ratio = nodes.add("Div", [rows, steps], f"{name}.ratio")
    size = nodes.add("Abs", [ratio], f"{name}.size")
    below2 = nodes.add("Less", [size, nodes.number(2.0)], f"{name}.below2")
    below4 = nodes.add("Less", [size, nodes.number(4.0)], f"{name}.below4")
    fine = nodes.add("Where", [below2, nodes.number(0.5), nodes.number(1.0)], f"{name}.fine")
    apart = nodes.add("Where", [below4, fine, nodes.number(2.0)], f"{name}.apart")
    exact = nodes.add("Div", [ratio, apart], f"{name}.exact")
    whole = nodes.add("Round", [exact], f"{name}.whole")
    near = nodes.add("Mul", [whole, apart], f"{name}.near")
    ended = nodes.add("Clip", [near, nodes.number(-LARGEST), nodes.number(LARGEST)], f"{name}.ended")
    shape = nodes.add("Shape", [x], f"{name}.shape")
    values = nodes.add("Reshape", [ended, shape], f"{name}.values")
    nodes.add("Cast", [values], name, to=FLOAT8)
