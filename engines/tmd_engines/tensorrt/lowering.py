"""Changes that TensorRT wants in a graph. Made on the loaded model in memory, never stored in a bundle.

TensorRT 10.15 and newer have the operators of a bundle's graphs and get their 4-D forms; older ones (JetPack 6 has
10.3, which reads up to opset 20) get attention, RMS norm and rotary embedding in primitives, and fuse what they
recognise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..bundle.operators import PLAIN_ATTENTION
from ..cost.shapes import Tensor, infer_shapes

if TYPE_CHECKING:
    import onnx

CANONICAL_SINCE = (10, 15)  # RotaryEmbedding and RMSNormalization; Attention is in 10.14 already
_PRIMITIVE_OPSET = 20
_BATCH_HEADS_ROWS = [0, 2, 1, 3]
_BATCH_HEADS_COLUMNS = [0, 2, 3, 1]
# Attributes newer than opset 20. Zero and the first choice are what was always so.
_LATER = {
    "Cast": ("round_mode",),
    "DequantizeLinear": ("block_size", "output_dtype"),
    "QuantizeLinear": ("block_size", "output_dtype", "precision"),
}


def lower(model: onnx.ModelProto, version: tuple[int, int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Makes `model`, a graph as tmd-export writes it, one for TensorRT `version` (major, minor).

    `shapes` are those of the inputs, of any size that the graph takes: the result serves all sizes. What has no form
    that TensorRT takes is left as it is, for the parser or `lint` to name. Raises BundleError if the graph's types and
    ranks cannot be found.
    """
    rewrite = _Rewrite(model, shapes)
    canonical = version >= CANONICAL_SINCE
    rules: dict[str, Callable[[_Rewrite, Any], bool]] = {"Clip": _integer_clip}
    if canonical:
        rules |= {"Attention": _attention_4d, "RotaryEmbedding": _rotary_4d}
    else:
        rules |= {"Attention": _attention, "RotaryEmbedding": _rotary, "RMSNormalization": _rms_norm}
    for node in list(model.graph.node):
        rule = rules.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if rule is None or not rule(rewrite, node):
            rewrite.nodes.append(copy.deepcopy(node))
    rewrite.finish()
    _bytes_first(model)
    _bytes_last(model)
    if not canonical:
        _to_primitive_opset(model)


class _Rewrite:
    """The nodes of a graph in the making, and what is known of its tensors."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, Tensor] = infer_shapes(model, shapes, model.graph.name).tensors
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self._model = model
        self._constants: dict[str, onnx.TensorProto] = {}

    def add(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"lowered/{output}", **attributes))
        return output

    def constant(self, elem_type: int, dims: list[int], values: list[Any]) -> str:
        from onnx import helper

        name = f"lowered/constant/{elem_type}/{'x'.join(map(str, dims))}/{'_'.join(map(str, values))}"
        if name not in self._constants:
            self._constants[name] = helper.make_tensor(name, elem_type, dims, values)
        return name

    def ints(self, *values: int) -> str:
        from onnx import TensorProto

        return self.constant(TensorProto.INT64, [len(values)], list(values))

    def heads(self, source: str, output: str, heads: int, perm: list[int]) -> str:
        """[B, S, heads*D] as [B, heads, S, D], or as `perm` says of [B, S, heads, D]."""
        split = self.add("Reshape", [source, self.ints(0, 0, heads, -1)], f"{output}.split")
        return self.add("Transpose", [split], output, perm=perm)

    def merge(self, source: str, output: str) -> None:
        """[B, heads, S, D] as [B, S, heads*D]."""
        rows = self.add("Transpose", [source], f"{output}.rows", perm=_BATCH_HEADS_ROWS)
        self.add("Reshape", [rows, self.ints(0, 0, -1)], output)

    def finish(self) -> None:
        """Puts the nodes in place of the old ones, without those whose results nobody uses any more."""
        graph = self._model.graph
        used = {value.name for value in graph.output}
        kept = []
        for node in reversed(self.nodes):
            if used & set(node.output):
                used |= set(node.input)
                kept.append(node)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(reversed(kept))
        graph.initializer.extend(self._constants.values())


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _plain_heads(node: onnx.NodeProto) -> tuple[int, float | None] | None:
    """Heads and scale (None: the default) of an attention that can be rewritten; None: it is of another kind."""
    attributes = _attributes(node)
    heads, scale = attributes.pop("q_num_heads", None), attributes.pop("scale", None)
    if (
        not heads
        or scale == 0.0
        or attributes.pop("kv_num_heads", heads) != heads
        or any(node.input[4:])
        or any(node.output[1:])
    ):
        return None
    if any(PLAIN_ATTENTION.get(name) != value for name, value in attributes.items()):
        return None
    return heads, scale


def _attention_4d(rewrite: _Rewrite, node: onnx.NodeProto) -> bool:
    plain = _plain_heads(node)
    if plain is None:
        return False
    output = node.output[0]
    q, k, v = (
        rewrite.heads(name, f"{output}.{part}", plain[0], _BATCH_HEADS_ROWS)
        for name, part in zip(node.input, "qkv", strict=False)
    )
    # The parser refuses softmax_precision whatever it says (onnx-tensorrt, importer of Attention); fused kernels sum in
    # float32 by themselves.
    dropped = ("q_num_heads", "kv_num_heads", "softmax_precision")
    kept = {name: value for name, value in _attributes(node).items() if name not in dropped}
    rewrite.add("Attention", [q, k, v, *node.input[3:4]], f"{output}.heads", **kept)
    rewrite.merge(f"{output}.heads", output)
    return True


def _attention(rewrite: _Rewrite, node: onnx.NodeProto) -> bool:
    """softmax(scale q k^T + mask) v, with the scale on q.

    This is the pattern that TensorRT fuses, and it must: at 32,760 tokens the scores of 12 heads are 25 GB in float16.
    `softmax_precision` is not written out, because a Cast inside the pattern would break it; fused kernels sum in
    float32 by themselves.
    """
    plain = _plain_heads(node)
    if plain is None:
        return False
    heads, scale = plain
    output = node.output[0]
    q = rewrite.heads(_scaled(rewrite, node, heads, scale), f"{output}.q", heads, _BATCH_HEADS_ROWS)
    k = rewrite.heads(node.input[1], f"{output}.k", heads, _BATCH_HEADS_COLUMNS)
    v = rewrite.heads(node.input[2], f"{output}.v", heads, _BATCH_HEADS_ROWS)
    scores = rewrite.add("MatMul", [q, k], f"{output}.scores")
    if any(node.input[3:4]):
        scores = rewrite.add("Add", [scores, node.input[3]], f"{output}.masked")
    weights = rewrite.add("Softmax", [scores], f"{output}.weights", axis=-1)
    rewrite.add("MatMul", [weights, v], f"{output}.heads")
    rewrite.merge(f"{output}.heads", output)
    return True


def _scaled(rewrite: _Rewrite, node: onnx.NodeProto, heads: int, scale: float | None) -> str:
    """q times the scale, multiplied in float32: the scale itself would lose up to 0.4 % in bfloat16."""
    from onnx import TensorProto

    name, output = node.input[0], node.output[0]
    q = rewrite.tensors[name]
    factor = rewrite.constant(TensorProto.FLOAT, [], [(q.shape[-1] // heads) ** -0.5 if scale is None else scale])
    if q.dtype == TensorProto.FLOAT:
        return rewrite.add("Mul", [name, factor], f"{output}.scaled")
    maker = rewrite.makers.get(name)
    if maker is not None and maker.op_type == "Cast" and rewrite.tensors[maker.input[0]].dtype == TensorProto.FLOAT:
        wide = maker.input[0]
    else:
        wide = rewrite.add("Cast", [name], f"{output}.wide", to=TensorProto.FLOAT)
    product = rewrite.add("Mul", [wide, factor], f"{output}.product")
    return rewrite.add("Cast", [product], f"{output}.scaled", to=q.dtype)


def _rotary_heads(node: onnx.NodeProto) -> int | None:
    """Heads of a 3-D interleaved rotary embedding of whole heads, without position ids; None: it is another kind."""
    attributes = _attributes(node)
    whole = not attributes.get("rotary_embedding_dim") and not any(node.input[3:])
    return attributes.get("num_heads") if whole and attributes.get("interleaved") else None


def _rotary_4d(rewrite: _Rewrite, node: onnx.NodeProto) -> bool:
    heads, output = _rotary_heads(node), node.output[0]
    if not heads:
        return False
    x = rewrite.heads(node.input[0], f"{output}.x", heads, _BATCH_HEADS_ROWS)
    rewrite.add("RotaryEmbedding", [x, *node.input[1:3]], f"{output}.heads", interleaved=1)
    rewrite.merge(f"{output}.heads", output)
    return True


def _rotary(rewrite: _Rewrite, node: onnx.NodeProto) -> bool:
    """Turns each pair (a, b) of neighbours into (a cos - b sin, a sin + b cos)."""
    heads, output = _rotary_heads(node), node.output[0]
    if not heads:
        return False
    pairs = rewrite.add("Reshape", [node.input[0], rewrite.ints(0, 0, heads, -1, 2)], f"{output}.pairs")
    from onnx import helper

    parts = [f"{output}.a", f"{output}.b"]
    rewrite.nodes.append(helper.make_node("Split", [pairs], parts, name=f"lowered/{output}.a", axis=-1, num_outputs=2))
    cos, sin = (  # [B, S, D/2] over the heads and the pair
        rewrite.add("Unsqueeze", [table, rewrite.ints(2, 4)], f"{output}.{name}")
        for table, name in zip(node.input[1:3], ("cos", "sin"), strict=True)
    )

    def turned(name: str, kind: str, first: str, second: str) -> str:
        products = [
            rewrite.add("Mul", [part, table], f"{output}.{name}.{number}")
            for number, (part, table) in enumerate(zip(parts, (first, second), strict=True))
        ]
        return rewrite.add(kind, products, f"{output}.{name}")

    both = [turned("left", "Sub", cos, sin), turned("right", "Add", sin, cos)]
    rewrite.add("Concat", both, f"{output}.turned", axis=-1)
    rewrite.add("Reshape", [f"{output}.turned", rewrite.ints(0, 0, -1)], output)
    return True


def _rms_norm(rewrite: _Rewrite, node: onnx.NodeProto) -> bool:
    """x / sqrt(mean(x^2) + epsilon), in float32, times the scale."""
    from onnx import TensorProto

    attributes = _attributes(node)
    source, scale = node.input
    output = node.output[0]
    rank, scale_type = len(rewrite.tensors[source].shape), rewrite.tensors[scale].dtype
    if attributes.get("stash_type", 1) != TensorProto.FLOAT:
        return False
    axes = range(attributes.get("axis", -1) % rank - rank, 0)
    x = source
    if rewrite.tensors[source].dtype != TensorProto.FLOAT:
        x = rewrite.add("Cast", [x], f"{output}.x", to=TensorProto.FLOAT)
    square = rewrite.add("Mul", [x, x], f"{output}.square")
    mean = rewrite.add("ReduceMean", [square, rewrite.ints(*axes)], f"{output}.mean", keepdims=1)
    epsilon = rewrite.constant(TensorProto.FLOAT, [], [attributes.get("epsilon", 1e-5)])
    root = rewrite.add("Sqrt", [rewrite.add("Add", [mean, epsilon], f"{output}.sum")], f"{output}.root")
    normed = rewrite.add("Div", [x, root], f"{output}.normed")
    if scale_type != TensorProto.FLOAT:
        normed = rewrite.add("Cast", [normed], f"{output}.rounded", to=scale_type)
    rewrite.add("Mul", [normed, scale], output)
    return True


def _integer_clip(rewrite: _Rewrite, node: onnx.NodeProto) -> bool:
    """Clip of integers, which TensorRT has not, as Max and Min, which it has."""
    from onnx import TensorProto

    if rewrite.tensors[node.input[0]].dtype not in (TensorProto.INT64, TensorProto.INT32) or not any(node.input[1:]):
        return False
    bounds = [(kind, bound) for kind, bound in zip(("Max", "Min"), node.input[1:], strict=False) if bound]
    source = node.input[0]
    for number, (kind, bound) in enumerate(bounds, 1):
        source = rewrite.add(
            kind, [source, bound], node.output[0] if number == len(bounds) else f"{node.output[0]}.{number}"
        )
    return True


def _bytes_first(model: onnx.ModelProto) -> None:
    """Lets what asks a uint8 input for its shape ask the Cast of it: TensorRT has uint8 at a network's ends only."""
    from onnx import TensorProto

    nodes = model.graph.node
    for value in model.graph.input:
        users = [node for node in nodes if value.name in node.input]
        cast = next((node for node in users if node.op_type == "Cast"), None)
        if value.type.tensor_type.elem_type != TensorProto.UINT8 or cast is None:
            continue
        for node in users:
            if node.op_type == "Shape":
                node.input[0] = cast.output[0]
        first = copy.deepcopy(cast)
        nodes.remove(cast)
        nodes.insert(0, first)


def _bytes_last(model: onnx.ModelProto) -> None:
    """Moves the Cast to uint8 behind the Transpose or Reshape after it: TensorRT has uint8 at a network's ends only."""
    from onnx import TensorProto

    nodes = model.graph.node
    makers = {node.output[0]: node for node in nodes if node.output}
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for value in model.graph.output:
        uses[value.name] = uses.get(value.name, 0) + 1
    for node in nodes:
        cast = makers.get(node.input[0]) if node.op_type in ("Transpose", "Reshape") else None
        if cast is None or cast.op_type != "Cast" or uses[cast.output[0]] != 1:
            continue
        if _attributes(cast)["to"] == TensorProto.UINT8:
            first, second, between, last = cast, node, cast.output[0], node.output[0]
            source = first.input[0]
            rest = list(second.input[1:])
            moved, final = copy.deepcopy(second), copy.deepcopy(first)
            del moved.input[:], moved.output[:], final.input[:], final.output[:]
            moved.input.extend([source, *rest])
            moved.output.append(between)
            final.input.append(between)
            final.output.append(last)
            first.CopyFrom(moved)
            second.CopyFrom(final)


def _to_primitive_opset(model: onnx.ModelProto) -> None:
    """States opset 20, after dropping attributes that came later where they say what was always so."""
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = min(entry.version, _PRIMITIVE_OPSET)
    for node in model.graph.node:
        typed = any(node.input[2:])  # a zero point names the type as well
        for attribute in list(node.attribute):
            as_always = (attribute.i == 0 or (attribute.name == "output_dtype" and typed)) and attribute.s in (
                b"",
                b"up",
            )
            if attribute.name in _LATER.get(node.op_type, ()) and as_always:
                node.attribute.remove(attribute)
