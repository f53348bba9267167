"""Two versions of a graph in one: what they have in common is computed once."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def merge(graph: ir.Graph, other: ir.Graph, prefix: str, ends: Collection[str] = ()) -> dict[str, ir.Value]:
    """Adds to `graph` the nodes of `other` whose results are not those of `graph`, under names with `prefix`.

    `other` was made of a copy of `graph` by replacing operands and inserting nodes. Values are matched by name. What is
    read behind a value of `ends` is that of `graph`, whatever `other` makes of it. Returns name in `other` -> value in
    `graph` for all that differs.
    """
    known = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    producers = {output.name: node for node in graph for output in node.outputs}
    known |= {output.name: output for node in graph for output in node.outputs}
    found: dict[str, ir.Value] = {}  # of `other` -> new in `graph`
    anchor: ir.Node | None = None  # nodes of `other` that come next belong behind it
    early: list[ir.Node] = []

    def of(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        name = value.name or ""
        if name in found and name not in ends:
            return found[name]
        if name not in known:
            known[name] = graph.initializers[name] = _initializer(value)
        return known[name]

    for node in other:
        twin = producers.get(node.outputs[0].name)
        inputs = [of(value) for value in node.inputs]
        if twin is not None and twin.op_type == node.op_type and list(twin.inputs) == inputs:
            anchor = twin
            continue
        copy = _copied(node, inputs, prefix)
        found |= {old.name or "": new for old, new in zip(node.outputs, copy.outputs, strict=True)}
        if anchor is None:
            early.append(copy)
        else:
            graph.insert_after(anchor, copy)
            anchor = copy
    if early:
        graph.insert_before(next(iter(graph)), early)
    return found


def _copied(node: ir.Node, inputs: list[ir.Value | None], prefix: str) -> ir.Node:
    import onnx_ir as ir

    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        num_outputs=len(node.outputs),
        name=f"{prefix}{node.name}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = f"{prefix}{old.name}" if old.name else old.name
    return copy


def _initializer(value: ir.Value) -> ir.Value:
    import onnx_ir as ir

    return ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
