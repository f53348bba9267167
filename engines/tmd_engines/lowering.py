"""Changes that ONNX Runtime on a CPU wants in a graph. Made on the loaded model in memory, never stored in a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

# What a plain attention may say besides its head counts; anything else keeps the standard operator.
_PLAIN = {"is_causal": 0, "qk_matmul_output_mode": 0, "softcap": 0.0, "softmax_precision": 1}


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
        and all(_PLAIN.get(name) == value for name, value in attributes.items())
    )
