"""Where in a graph an error is as good as made: the sums through which everything passes that a layer computes.

In a transformer these are the residual sums. Between two of them errors go through norms, softmax and activation
functions, which weaken some layers' errors and not others'; from one to the next all errors travel alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .layers import Layer

if TYPE_CHECKING:
    import onnx_ir as ir

_SIZES = ("Shape", "Size")  # they read no value


def sums_behind(graph: ir.Graph, layers: Sequence[Layer]) -> dict[str, ir.Value | None]:
    """Layer -> the first sum of all that it changes with something that it does not change; None if there is none."""
    nodes = list(graph)
    places = {node: place for place, node in enumerate(nodes)}
    return {layer.name: _sum_behind(nodes[places[layer.node] :], layer.node.outputs[0]) for layer in layers}


def trunk(graph: ir.Graph, sums: Sequence[ir.Value | None]) -> list[ir.Value]:
    """`sums` and the sums behind them, each once, in the order of the graph."""
    nodes = list(graph)
    places = {value: place for place, node in enumerate(nodes) for value in node.outputs}
    found: set[ir.Value] = set()
    for value in sums:
        while value is not None and value not in found:
            found.add(value)
            value = _sum_behind(nodes[places[value] + 1 :], value)
    return sorted(found, key=places.__getitem__)


def _sum_behind(nodes: Sequence[ir.Node], value: ir.Value) -> ir.Value | None:
    """The first sum in `nodes`, which are all nodes behind `value`, that is the only way from `value` on."""
    changed = {value}
    waiting = {value: _readers(value)}  # what is changed and still read by nodes to come
    for node in nodes:
        read = [each for each in node.inputs if each is not None and each in changed]
        if not read or node.op_type in _SIZES:
            for each in read:
                _count_down(waiting, each)
            continue
        for each in read:
            _count_down(waiting, each)
        for output in node.outputs:
            changed.add(output)
            if readers := _readers(output):
                waiting[output] = readers
        result = node.outputs[0]
        if node.op_type == "Add" and set(waiting) == {result}:
            other = [each for each in node.inputs if each not in changed]
            if len(other) == 1 and other[0] is not None and not other[0].is_initializer():
                return result
    return None


def _readers(value: ir.Value) -> int:
    return len(value.uses()) + value.is_graph_output()


def _count_down(waiting: dict[ir.Value, int], value: ir.Value) -> None:
    waiting[value] -= 1
    if not waiting[value]:
        del waiting[value]
