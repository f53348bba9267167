"""What TensorRT would refuse in a graph, found before it is asked: a build takes minutes, and a parser says little.

Operators and types come from `tensorrt_support`. The rules for quantization are those of the same project's importer
(QuantDequantLinearHelper in onnxOpImporters.cpp), of NVIDIA's demo/Diffusion for attention in FP8, and of
Model-Optimizer for weights (modelopt/onnx/export/fp8_exporter.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cost.shapes import Tensor, infer_shapes
from ..errors import EngineError, quote
from .support import QUANTIZED, Support, support_of

if TYPE_CHECKING:
    import onnx

Problems = Iterator[str]
_SHOWN = 3
_PRODUCTS = ("MatMul", "Gemm", "Conv")
_BLOCKED = ("FP8", "FP4", "INT4")
_READ_BYTES = 1 << 20  # scales and zero points are read up to this size


def check_graph(
    model: onnx.ModelProto,
    shapes: Mapping[str, tuple[int, ...]],
    version: tuple[int, int],
    where: str,
    folder: Path | None = None,
) -> None:
    """Raises EngineError with the first problems of `lint`; `where` names the graph."""
    problems = lint(model, shapes, version, folder)
    if problems:
        shown = "; ".join(problems[:_SHOWN]) + (
            f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        )
        raise EngineError(
            f"TensorRT {version[0]}.{version[1]} cannot take {where}: {shown}. Export the bundle again with this "
            "version of tmd, or use another engine or precision."
        )


def lint(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], version: tuple[int, int], folder: Path | None = None
) -> list[str]:
    """Every rule of TensorRT `version` (major, minor) that a lowered graph breaks, one sentence each.

    `shapes` are those of the inputs. `folder` is where the weights lie; without it only values in the graph itself are
    looked at. Raises BundleError if the graph's types cannot be found.
    """
    support = support_of(version)
    problems = [problem for rule in _NAMES for problem in rule(model, support)]
    if problems:
        return problems  # types cannot be inferred for operators that nobody knows
    graph = _Graph(
        model, support, infer_shapes(_newest(model), shapes, model.graph.name or "the graph").tensors, folder
    )
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
    folder: Path | None
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    users: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in self.model.graph.node:
            self.makers |= dict.fromkeys(node.output, node)
            for name in set(node.input):
                self.users.setdefault(name, []).append(node)
        self.weights = {weight.name: weight for weight in self.model.graph.initializer}

    def type(self, name: str) -> str:
        return _type_name(self.tensors[name].dtype) if name in self.tensors else ""

    def nodes(self, *kinds: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.model.graph.node if node.op_type in kinds)

    def value(self, name: str) -> Any:
        """The numpy array behind a constant; None if there is none, or it is not to be read."""
        from onnx import numpy_helper

        weight = self.weights.get(name)
        if weight is None or prod(weight.dims) > _READ_BYTES or (weight.external_data and self.folder is None):
            return None
        return numpy_helper.to_array(weight, str(self.folder or ""))


def _type_name(dtype: int) -> str:
    """TensorRT's word for an ONNX element type."""
    from onnx import TensorProto

    names = {"FLOAT": "FP32", "FLOAT16": "FP16", "BFLOAT16": "BF16", "FLOAT8E4M3FN": "FP8", "FLOAT4E2M1": "FP4"}
    name = TensorProto.DataType.Name(dtype)
    return names.get(name, name)


def _show(node: onnx.NodeProto) -> str:
    return f"{quote(node.op_type)[1:-1]} {quote(node.name or (node.output[0] if node.output else ''))}"


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    from onnx import helper

    found = next((attribute for attribute in node.attribute if attribute.name == name), None)
    return default if found is None else helper.get_attribute_value(found)


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
        elif any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            yield f"{_show(node)} has a graph of its own"


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
                continue  # scale and zero point have rules of their own
            if (node.op_type, position, found) in (("Where", 0, "BOOL"), ("Attention", 3, "BOOL")):
                continue
            yield f"{_show(node)} has {found} data ({quote(name)}), and it takes {' '.join(sorted(allowed))}"


def _bytes_at_the_ends(graph: _Graph) -> Problems:
    """uint8 is a type of network inputs and outputs, with a Cast beside them, from and to FP32 or FP16."""
    inputs = {value.name for value in graph.model.graph.input}
    outputs = {value.name for value in graph.model.graph.output}
    for name in graph.tensors:
        if graph.type(name) != "UINT8" or name in graph.weights:
            continue
        maker, users = graph.makers.get(name), graph.users.get(name, [])
        made_well = name in inputs or (maker is not None and maker.op_type == "Cast" and name in outputs and not users)
        used_well = all(user.op_type == "Cast" for user in users)
        if not (made_well and used_well):
            yield f"{quote(name)} is UINT8 inside the network, where only inputs and outputs can be"
        elif maker is not None and graph.type(maker.input[0]) not in ("FP32", "FP16"):
            yield f"{_show(maker)} makes UINT8 of {graph.type(maker.input[0])}, and only FP32 and FP16 can become it"


def _constant_axes(graph: _Graph) -> Problems:
    position = {"Slice": 3, "Pad": 3}
    for node in graph.nodes(*graph.support.constant_axes):
        axes = node.input[position.get(node.op_type, 1) :][:1]
        if any(name and name not in graph.weights for name in axes):
            yield f"the axes of {_show(node)} are computed, and must be a constant"


def _attention(graph: _Graph) -> Problems:
    for node in graph.nodes("Attention"):
        ranks = [len(graph.tensors[name].shape) for name in node.input[:4] if name]
        if any(rank != 4 for rank in ranks):
            yield f"{_show(node)} has inputs of {'/'.join(map(str, ranks))} dimensions, and must have 4-D ones"
        if any(node.input[4:]) or any(node.output[1:]):
            yield f"{_show(node)} has a cache or more than one output"
        if _attribute(node, "softcap", 0.0) or _attribute(node, "qk_matmul_output_mode", 0):
            yield f"{_show(node)} has a soft cap or gives its scores"
        if _attribute(node, "is_causal", 0) and any(node.input[3:4]):
            yield f"{_show(node)} is causal and has a mask as well"


def _norms_and_rotation(graph: _Graph) -> Problems:
    for node in graph.nodes("LayerNormalization"):
        if any(node.output[1:]):
            yield f"{_show(node)} has more than one output"
    for node in graph.nodes("LayerNormalization", "RMSNormalization"):
        kinds = {graph.type(name) for name in node.input if name}
        if len(kinds) > 1:
            yield f"{_show(node)} has inputs of different types ({' '.join(sorted(kinds))}) in a strongly typed network"
    for node in graph.nodes("RotaryEmbedding"):
        if any(node.input[3:4]) and graph.type(node.input[3]) != "INT64":
            yield f"{_show(node)} has position ids that are not INT64"
        if len(graph.tensors[node.input[0]].shape) != 4:
            yield f"{_show(node)} has 3-D data, and the layer behind it takes [batch, heads, sequence, width]"


# Rules of quantization.


def _quantized_types(graph: _Graph) -> Problems:
    """INT8, FP8, INT4 and FP4 values come from a QuantizeLinear or a weight, and go into a DequantizeLinear."""
    ends = {value.name for value in (*graph.model.graph.input, *graph.model.graph.output)}
    for name in graph.tensors:
        if graph.type(name) not in QUANTIZED:
            continue
        maker = graph.makers.get(name)
        if name in ends or (maker is not None and maker.op_type != "QuantizeLinear"):
            yield f"{quote(name)} is {graph.type(name)} and no QuantizeLinear made it"
        for user in graph.users.get(name, []):
            zero_point = user.op_type in ("QuantizeLinear", "DequantizeLinear") and name in user.input[2:]
            if not zero_point and user.op_type not in ("DequantizeLinear", "Attention"):
                yield f"{quote(name)} is {graph.type(name)} and goes into {_show(user)}, not into a DequantizeLinear"


def _scales(graph: _Graph) -> Problems:
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        quantizing = node.op_type == "QuantizeLinear"
        data, scale = node.input[:2]
        narrow = graph.type(node.output[0] if quantizing else data)
        wide = graph.type(data) if quantizing else graph.type(node.output[0])
        zero_point = node.input[2] if any(node.input[2:3]) else None
        if quantizing and zero_point is None and not _attribute(node, "output_dtype"):
            yield f"{_show(node)} has neither a zero point nor output_dtype: it would become INT8"
        for name, wrong, said in (
            (zero_point, lambda value: bool((value != 0).any()), "a zero point that is not zero"),
            (scale, lambda value: not bool((value > 0).all()), "a scale that is not above zero"),
        ):
            value = graph.value(name) if name else None
            if value is not None and wrong(value.astype("float32")):
                yield f"{_show(node)} has {said}"
        if graph.type(scale) not in (wide, "FP32"):
            yield f"{_show(node)} has a scale in {graph.type(scale)} for values in {wide}"
        yield from _scale_shape(graph, node, narrow)


def _scale_shape(graph: _Graph, node: onnx.NodeProto, narrow: str) -> Problems:
    """One scale, one per channel of a weight, or one per block of a weight along one dimension."""
    data, scale = graph.tensors[node.input[0]].shape, graph.tensors[node.input[1]].shape
    weight = node.input[0] in graph.weights
    if prod(scale) == 1 and len(scale) <= 1:
        return
    if len(scale) == 1:
        axis = _attribute(node, "axis", 1)
        if not weight:
            yield f"{_show(node)} has a scale per channel, which only weights may have"
        elif not -len(data) <= axis < len(data) or data[axis] != scale[0]:
            yield f"{_show(node)} has {scale[0]} scales, which is no size of its axis {axis} of {list(data)}"
    elif narrow not in _BLOCKED:
        yield f"{_show(node)} has {narrow} values in blocks, which {' '.join(_BLOCKED)} alone may have"
    elif len(scale) != len(data) or sum(a != b for a, b in zip(data, scale, strict=True)) != 1:
        yield f"{_show(node)} is not blocked along exactly one dimension ({list(data)} with scales {list(scale)})"


def _weights_into_products(graph: _Graph) -> Problems:
    """An FP8 weight goes from its DequantizeLinear straight into the product: a Transpose between unfuses it."""
    for node in graph.nodes("DequantizeLinear"):
        if node.input[0] not in graph.weights or graph.type(node.input[0]) != "FP8":
            continue
        for user in graph.users.get(node.output[0], []):
            if user.op_type not in _PRODUCTS:
                yield f"the FP8 weight of {_show(node)} goes into {_show(user)}, not straight into a product"


def _quantized_attention(graph: _Graph) -> Problems:
    """Both products of an attention are in FP8 or neither, in heads of a multiple of 16."""
    for node in graph.nodes("Softmax"):
        scores = _product_before(graph, node.input[0])
        after = [user for user in graph.users.get(node.output[0], []) if user.op_type != "Cast"]
        if scores is None or not after:
            continue
        first = [_is_fp8(graph, name) for name in scores.input]
        second = [_is_fp8(graph, name) for user in _products_after(graph, node.output[0]) for name in user.input]
        if not any(first) and not any(second):
            continue
        width = graph.tensors[scores.input[0]].shape[-1]
        if not all(first) or not second or not all(second):
            yield f"the attention around {_show(node)} has FP8 in some inputs of its products, and needs it in all four"
        if width % 16:
            yield f"the attention around {_show(node)} is in FP8 with heads of {width}, and needs a multiple of 16"


def _product_before(graph: _Graph, name: str) -> onnx.NodeProto | None:
    """The MatMul that made the scores, looked for through scaling, masking and casting."""
    for _ in range(4):
        maker = graph.makers.get(name)
        if maker is None or maker.op_type == "MatMul":
            return maker
        if maker.op_type not in ("Mul", "Div", "Add", "Cast", "Where"):
            return None
        name = next((found for found in maker.input if found in graph.makers), "")
    return None


def _products_after(graph: _Graph, name: str) -> Iterator[onnx.NodeProto]:
    for user in graph.users.get(name, []):
        if user.op_type == "MatMul":
            yield user
        elif user.op_type in ("Cast", "QuantizeLinear", "DequantizeLinear"):
            yield from _products_after(graph, user.output[0])


def _is_fp8(graph: _Graph, name: str) -> bool:
    maker = graph.makers.get(name)
    return maker is not None and maker.op_type == "DequantizeLinear" and graph.type(maker.input[0]) == "FP8"


_NAMES: tuple[Callable[[Any, Support], Problems], ...] = (_opset, _operators)
_RULES: tuple[Callable[[_Graph], Problems], ...] = (
    _types,
    _bytes_at_the_ends,
    _constant_axes,
    _attention,
    _norms_and_rotation,
    _quantized_types,
    _scales,
    _weights_into_products,
    _quantized_attention,
)
