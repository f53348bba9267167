"""New nodes and constants in a traced graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir


def add(operator: str, inputs: list[ir.Value], name: str, before: ir.Node, **attributes: Any) -> ir.Value:
    """The result, called `name`, of a new node in front of the node `before`."""
    import onnx_ir as ir

    node = ir.node(operator, inputs, attributes=attributes, name=f"node_{name}")
    node.outputs[0].name = name
    if before.graph is None:
        raise ValueError(f"{before.name} belongs to no graph")
    before.graph.insert_before(before, node)
    return node.outputs[0]


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer with these values; the one of that name if there is one."""
    import onnx_ir as ir

    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def weight(graph: ir.Graph, name: str, dtype: str, shape: tuple[int, ...]) -> ir.Value:
    """A new initializer whose values come when the graph is written. `dtype` is ONNX's name of its type."""
    import onnx_ir as ir

    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))
    graph.initializers[name] = made
    return made
