"""What each layer adds to the error of a graph of which all layers are quantized, from one pass.

One graph computes everything: the exact values, all layers quantized together, and every layer quantized alone on
exact inputs, up to the next sum that all of its effect goes through (`trunk`). There its own error is compared with the
error of all together: as errors of different layers are as good as independent, their squares add up, and what came
from earlier sums and what is new share the error that is there. Quantizing one layer after the other instead takes as
many passes as there are layers, and finds nearly the same (see docs/precision.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .layers import Layer
from .merging import merge
from .rounded import Rounded
from .sessions import open_session
from .trunk import sums_behind, trunk

if TYPE_CHECKING:
    import onnx_ir as ir

Arrays = Mapping[str, np.ndarray]
_TOGETHER = "together"


class Contributions:
    """Layer that can be kept -> relative L2 error of the result that is its part.

    The sum of the squares over all quantized layers is that of all together.
    """

    def __init__(self, rounded: Rounded) -> None:
        model = rounded.exact()
        graph, layers = model.graph, rounded.find(model)
        self._outputs, self._layers = list(rounded.outputs), list(rounded.layers)
        results = list(graph.outputs)
        sums = sums_behind(graph, layers)
        chain = trunk(graph, list(sums.values()))
        self._chain = [value.name or "" for value in chain]
        self._ends = {layer: None if value is None else value.name for layer, value in sums.items()}
        self._measured: list[str] = []
        watched = dict.fromkeys((*chain, *results))
        found = merge(graph, rounded.quantized().graph, f"{_TOGETHER}/")
        for value in watched:
            self._compare(graph, value, found, _TOGETHER)
        for number, chosen in enumerate(_rounds(graph, layers, sums, chain)):
            alone = rounded.quantized(exact=[layer.name for layer in layers if layer.name not in chosen])
            ends = {name for layer in chosen if (name := self._ends[layer])}
            found = merge(graph, alone.graph, f"{number}/", ends)
            for layer in chosen:
                end = sums[layer]
                for value in results if end is None else [end]:
                    self._compare(graph, value, found, layer)
        self._session: Any = open_session(model, rounded.path.parent)

    def __call__(self, passes: Sequence[tuple[Arrays, Arrays]]) -> dict[str, float]:
        """The table, from the inputs and outputs in float32 of `passes`."""
        squares: dict[str, float] = dict.fromkeys(self._measured, 0.0)
        size = 0.0
        for inputs, outputs in passes:
            found = self._session.run(self._measured, dict(inputs))
            for name, value in zip(self._measured, found, strict=True):
                squares[name] += float(value)
            size += sum(float(np.square(value, dtype=np.float64).sum()) for value in outputs.values())
        shares = self._shared(squares)
        return {layer: (share / size) ** 0.5 for layer, share in shares.items()}

    def _shared(self, squares: Mapping[str, float]) -> dict[str, float]:
        """Layer -> its part of the squared error of the result."""
        shares: dict[str, float] = {}
        for end in (*self._chain, None):
            places = self._outputs if end is None else [end]
            for layer in (layer for layer, its in self._ends.items() if its == end):
                shares[layer] = sum(squares.get(_name(layer, place), 0.0) for place in places)
            there = sum(squares.get(_name(_TOGETHER, place), 0.0) for place in places)
            known = sum(shares.values())
            if known:
                shares = {layer: share * there / known for layer, share in shares.items()}
        return {layer: shares[layer] for layer in self._layers}

    def _compare(self, graph: ir.Graph, value: ir.Value, changed: Mapping[str, ir.Value], who: str) -> None:
        """Makes the squared difference of `value` and what became of it an output."""
        import onnx_ir as ir

        other = changed.get(value.name or "")
        if other is None:
            return
        name = _name(who, value.name or "")
        difference = ir.node("Sub", [other, value], name=f"{name}/difference")
        total = ir.node("ReduceSumSquare", [difference.outputs[0]], {"keepdims": 0}, name=f"{name}/squares")
        difference.outputs[0].name, result = f"{name}/difference", total.outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        graph.insert_after(_later(graph, value, other), [difference, total])
        graph.outputs.append(result)
        self._measured.append(name)


def _name(who: str, value: str) -> str:
    return f"error/{who}/{value}"


def _later(graph: ir.Graph, one: ir.Value, other: ir.Value) -> ir.Node:
    makers = {one.producer(), other.producer()}
    return [node for node in graph if node in makers][-1]


def _rounds(
    graph: ir.Graph, layers: Sequence[Layer], sums: Mapping[str, ir.Value | None], chain: Sequence[ir.Value]
) -> list[list[str]]:
    """The layers in groups that do not disturb each other: each has its own sum, and no other's between.

    A layer whose effect goes through the sums of others, or to the result itself, is a group of its own.
    """
    places = {value: place for place, node in enumerate(graph) for value in node.outputs}
    singles: list[list[str]] = []
    shared: dict[str, list[str]] = {}
    for layer in layers:
        end, start = sums[layer.name], places[layer.node.outputs[0]]
        last = len(places) if end is None else places[end]
        if end is None or any(start < places[value] < last for value in chain):
            singles.append([layer.name])
        else:
            shared.setdefault(end.name or "", []).append(layer.name)
    most = max((len(group) for group in shared.values()), default=0)
    return singles + [[group[k] for group in shared.values() if k < len(group)] for k in range(most)]
