"""Changes that ONNX Runtime on a CPU wants in a graph. Made on the loaded model in memory, never stored in a bundle."""

from __future__ import annotations

import copy
from math import prod
from typing import TYPE_CHECKING, Any

from ..bundle.operators import PLAIN_ATTENTION
from ..errors import BundleError, quote
from ..holding import WIDENED_BYTES

if TYPE_CHECKING:
    import onnx


# Operators that pass values on or give integers: there is nothing to round behind them.
_EXACT = frozenset((
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
    "Unsqueeze",
))  # fmt: skip
_MEASURES = frozenset(("Shape", "Size", "QuantizeLinear"))  # results of a type of their own


def low_precision_to_float32(model: onnx.ModelProto, rounding: bool = False, where: str = "The graph") -> int:
    """Makes every float16 and bfloat16 tensor between the inputs and outputs of the graph a float32 one; those of the
    two types that it takes or gives are converted where they come in and go out.

    ONNX Runtime's CPU provider has no bfloat16 arithmetic, and computes float16 by converting there and back around
    every operator. The weights stay as they are in the data file, each with a `Cast` to float32 behind it, which ONNX
    Runtime does once when it loads the graph. Values that the graph would round are not rounded, unless `rounding`:
    then each is, to the type that it has in the graph, and the result is that of an engine that computes products in
    float32 and stores every value in low precision. Returns how many weights got a `Cast`.

    For graphs as tmd-export makes them: no `Constant` nodes, no functions or subgraphs. `where` names the file in
    messages. Raises BundleError for a `Cast` that does not say to what.
    """
    from onnx import TensorProto, helper

    low = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    types: dict[str, int] = {}  # name in the graph -> its low precision
    renamed: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []

    def cast(source: str, target: str, to: int) -> None:
        nodes.append(helper.make_node("Cast", [source], [target], name=f"cast/{target}", to=to))

    for weight in model.graph.initializer:
        if weight.data_type in low:
            types[weight.name] = weight.data_type
            renamed[weight.name] = f"{weight.name}.upcast"
            cast(weight.name, renamed[weight.name], TensorProto.FLOAT)
    weights = len(nodes)
    for value in model.graph.input:
        if (given := value.type.tensor_type.elem_type) in low:
            types[value.name] = given
            renamed[value.name] = f"{value.name}.upcast"
            cast(value.name, renamed[value.name], TensorProto.FLOAT)
    passed = {value.name: kind for value in model.graph.output if (kind := value.type.tensor_type.elem_type) in low}
    read = {name for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        if node.op_type == "Cast" and passed.keys() & {*node.output} and not read & {*node.output}:
            _cast_target(node, where)
            for index, name in enumerate(node.input):
                node.input[index] = renamed.get(name, name)
            nodes.append(node)  # it is the conversion on the way out; one more behind it would hide what it waits for
            continue
        if node.op_type == "Cast":
            target = _cast_target(node, where)
            to, rounds = target.i, target.i in low
            if rounds:
                target.i = TensorProto.FLOAT
        else:
            to = next((types[name] for name in node.input if name in types), 0)
            rounds = node.op_type not in _EXACT
            if node.op_type in _MEASURES:
                to = 0
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name and to in low:
                types[name] = to
                wide = node.output[index] = f"{name}.wide" if name in passed else name
                if rounding and rounds:
                    node.output[index] = f"{name}.exact"
                    cast(f"{name}.exact", f"{name}.rounded", to)
                    cast(f"{name}.rounded", wide, TensorProto.FLOAT)
                if name in passed:
                    renamed[name] = wide
                    cast(wide, name, passed[name])
    if types:
        nodes = [copy.deepcopy(node) for node in nodes]  # they belong to the list that is emptied next
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(nodes)
    return weights


def _cast_target(node: onnx.NodeProto, where: str) -> onnx.AttributeProto:
    from onnx import AttributeProto

    for attribute in node.attribute:
        if attribute.name == "to" and attribute.type == AttributeProto.INT and not attribute.ref_attr_name:
            return attribute
    raise BundleError(
        f"{where}: node Cast {quote(node.name)} does not say which type it converts to. Make the bundle again with "
        "tmd-export, and do not run graphs from elsewhere."
    )


def signed_to_unsigned_activations(model: onnx.ModelProto) -> int:
    """Makes int8 activations with zero point 0 uint8 ones with zero point 128, the same values. Returns how many.

    ONNX Runtime fuses Q/DQ with every product of uint8 and int8, and with half of those of two int8; the graph has
    int8 because TensorRT takes no zero point but zero.
    """
    from onnx import TensorProto, helper

    weights = {weight.name: weight for weight in model.graph.initializer}
    names = {node.input[2] for node in model.graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    zeros = {name for name in names if name in weights and _is_int8_zero(weights[name])}
    changed = 0
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2 and node.input[2] in zeros:
            changed += node.op_type == "QuantizeLinear"
            node.input[2] = f"{node.input[2]}.unsigned"
    model.graph.initializer.extend(
        helper.make_tensor(f"{name}.unsigned", TensorProto.UINT8, [], [128]) for name in sorted(zeros)
    )
    return changed


def _is_int8_zero(tensor: onnx.TensorProto) -> bool:
    from onnx import TensorProto

    is_scalar = tensor.data_type == TensorProto.INT8 and not tensor.dims
    return is_scalar and (tensor.raw_data == b"\0" or (not tensor.raw_data and list(tensor.int32_data) == [0]))


def attention_to_multi_head_attention(model: onnx.ModelProto) -> int:
    """Replaces 3-D `Attention` nodes (opset 23) by `com.microsoft.MultiHeadAttention`. Returns how many.

    ONNX Runtime's CPU kernel of `Attention` holds the whole score matrix, batch x heads x queries x keys (3.2 GB at
    8,192 tokens and 12 heads); its `MultiHeadAttention` works in tiles. Both compute softmax(scale q k^T) v, with scale
    1/sqrt(head_dim) by default.

    Left alone: 4-D attention, masks, causal attention, caches, soft caps, grouped heads. (The text encoder has masks,
    and its sequences are short.)
    """
    from onnx import helper

    replaced = 0
    for node in model.graph.node:
        if node.op_type != "Attention" or node.domain not in ("", "ai.onnx"):
            continue
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if not _is_plain(node, dict(attributes)):
            continue
        kept = {"num_heads": attributes["q_num_heads"]}
        if "scale" in attributes:
            kept["scale"] = attributes["scale"]
        node.op_type, node.domain = "MultiHeadAttention", "com.microsoft"
        del node.input[3:], node.output[1:], node.attribute[:]
        node.attribute.extend(helper.make_attribute(name, value) for name, value in kept.items())
        replaced += 1
    if replaced and all(entry.domain != "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return replaced


def _is_plain(node: onnx.NodeProto, attributes: dict[str, Any]) -> bool:
    heads = attributes.pop("q_num_heads", None)  # only the 3-D form has it
    if not heads or attributes.pop("kv_num_heads", heads) != heads:
        return False
    # MultiHeadAttention reads scale 0 as "not given".
    if attributes.pop("scale", None) == 0.0:
        return False
    return (
        not any(node.input[3:])
        and not any(node.output[1:])
        and all(PLAIN_ATTENTION.get(name) == value for name, value in attributes.items())
    )


def widens_in_products(model: onnx.ModelProto) -> bool:
    """Whether the large weights that `low_precision_to_float32` put a `Cast` behind may stay in 16 bits in memory.

    They may where only products of matrices read them: a `Cast` takes a hundredth of the product's time. A convolution
    wants its weights when the graph is loaded, in an order of their own.
    """
    sizes = {weight.name: 4 * prod(weight.dims) for weight in model.graph.initializer}
    large = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Cast" and sizes.get(node.input[0], 0) > WIDENED_BYTES
    }
    readers = {node.op_type for node in model.graph.node for name in node.input if name in large}
    return bool(readers) and readers <= {"MatMul", "Gemm"}


def lean_order(model: onnx.ModelProto) -> None:
    """Puts the nodes into an order in which ONNX Runtime can free memory early.

    ONNX Runtime begins with the last node that nothing reads, and runs all that this one needs, each value just before
    the node that reads it, then the one before it. In the VAE the last one needs everything, and what the others keep
    for the next call waits until then: 2.7 times the memory. So those nodes come last, and of them the one that can run
    first comes at the very end.
    """
    made_by = {name: place for place, node in enumerate(model.graph.node) for name in node.output}
    read = {name for node in model.graph.node for name in node.input}
    nodes = [copy.deepcopy(node) for node in model.graph.node]  # they belong to the list that is emptied next
    leaves = [node for node in nodes if not read & {*node.output}]
    leaves.sort(key=lambda node: -max((made_by.get(name, -1) for name in node.input), default=-1))
    del model.graph.node[:]
    model.graph.node.extend(node for node in nodes if read & {*node.output})
    model.graph.node.extend(leaves)
