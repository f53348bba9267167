"""What an older TensorRT would refuse in a graph: operators, types and axes that its parser has not, by its version.

NVIDIA's parser and builder themselves take every graph of ours in the tests, in both lowerings. They are those of
TensorRT 11, and cannot tell what 10.3 lacks; that is written down in `support.py`. From 11 on they are asked directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cost.shapes import Tensor, infer_shapes
from ..errors import EngineError, quote
from .support import ASKED_SINCE, Support, support_of

if TYPE_CHECKING:
    import onnx

Problems = Iterator[str]
_SHOWN = 3


def check_graph(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], version: tuple[int, int], where: str
) -> None:
    """Raises EngineError with the first problems of `lint`; `where` names the graph."""
    problems = lint(model, shapes, version)
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + (
            f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        )
        raise EngineError(
            f"TensorRT {version[0]}.{version[1]} cannot take {where}: {shown}. Export the bundle again with this "
            "version of tmd, or use another engine or precision."
        )


def lint(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], version: tuple[int, int]) -> list[str]:
    """Every rule of TensorRT `version` (major, minor) that a lowered graph breaks, one sentence each.

    `shapes` are those of the inputs. Raises BundleError if the graph's types cannot be found.
    """
    if version >= ASKED_SINCE:
        return []
    support = support_of(version)
    problems = [problem for rule in _NAMES for problem in rule(model, support)]
    if problems:
        return problems  # types cannot be inferred for operators that nobody knows
    tensors = infer_shapes(_newest(model), shapes, model.graph.name or "the graph").tensors
    graph = _Graph(model, support, tensors, {weight.name for weight in model.graph.initializer})
    return [problem for rule in _RULES for problem in rule(graph)]


def _newest(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as if written in opset 23 or later: ONNX has no bfloat16 convolution in opset 20, and TensorRT has."""
    newest: onnx.ModelProto = type(model)()
    newest.CopyFrom(model)
    for entry in newest.opset_import:
        entry.version = max(entry.version, 23)
    return newest


@dataclass
class _Graph:
    model: onnx.ModelProto
    support: Support
    tensors: dict[str, Tensor]
    weights: set[str]

    def type(self, name: str) -> str:
        return _type_name(self.tensors[name].dtype) if name in self.tensors else ""


def _type_name(dtype: int) -> str:
    """TensorRT's word for an ONNX element type."""
    from onnx import TensorProto

    names = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}
    name = TensorProto.DataType.Name(dtype)
    return names.get(name, name)


def _show(node: onnx.NodeProto) -> str:
    return f"{quote(node.op_type)[1:-1]} {quote(node.name or (node.output[0] if node.output else ''))}"


# Rules that need no types.


def _opset(model: onnx.ModelProto, support: Support) -> Problems:
    for entry in model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield f"it has operators of the domain {quote(entry.domain)}"
        elif entry.version not in support.opsets:
            first, last = support.opsets[0], support.opsets[-1]
            yield f"it is written in opset {entry.version}, and the parser reads {first} to {last}"


def _operators(model: onnx.ModelProto, support: Support) -> Problems:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in support.operators:
            yield f"{_show(node)} is an operator that it has not"


# Rules about types and constants.


def _types(graph: _Graph) -> Problems:
    """The data of every node has a type of the matrix; indices, axes and shapes beside it may be integers."""
    for node in graph.model.graph.node:
        allowed = graph.support.operators[node.op_type]
        for position, name in enumerate(node.input):
            found = graph.type(name)
            if not name or found in allowed or (position and found in ("INT32", "INT64")):
                continue
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and position:
                continue  # scale and zero point, which the parser of any version looks at
            if (node.op_type, position, found) in (("Where", 0, "BOOL"), ("Attention", 3, "BOOL")):
                continue
            yield f"{_show(node)} has {found} data ({quote(name)}), and it takes {' '.join(sorted(allowed))}"


def _constant_axes(graph: _Graph) -> Problems:
    position = {"Slice": 3, "Pad": 3}
    for node in graph.model.graph.node:
        if node.op_type in graph.support.constant_axes:
            axes = node.input[position.get(node.op_type, 1) :][:1]
            if any(name and name not in graph.weights for name in axes):
                yield f"the axes of {_show(node)} are computed, and must be a constant"


_NAMES: tuple[Callable[[Any, Support], Problems], ...] = (_opset, _operators)
_RULES: tuple[Callable[[_Graph], Problems], ...] = (_types, _constant_axes)
