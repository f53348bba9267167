"""Which products of a graph can be quantized: the linear layers of its transformer blocks, and their attention.

Everything else keeps its precision: embeddings of patches, time and text, modulation, norms, gates, the output layer.
They are few operations, and the whole result would feel their rounding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmd_engines.bundle.operators import PLAIN_ATTENTION

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION = ".attention"


@dataclass(frozen=True)
class Layer:
    """A product: a `MatMul` with a weight, or an `Attention`, which is two products.

    `name` is that of the module ("blocks.0.ffn.2", "blocks.0.self_attn.attention"), the same in every precision.
    """

    name: str
    node: ir.Node
    width: int  # columns of its weight; of an attention, those of its result

    @property
    def is_attention(self) -> bool:
        return self.node.op_type == "Attention"

    @property
    def rows(self) -> int:
        """Rows of its weight, which are the columns of its activation; 0 of an attention."""
        weight = None if self.is_attention else self.node.inputs[1]
        return 0 if weight is None or weight.shape is None else int(weight.shape[0])  # type: ignore[arg-type]

    @property
    def operands(self) -> dict[str, ir.Value]:
        """Name of a range -> the activation that has it."""
        if not self.is_attention:
            return {self.name: self.node.inputs[0]}  # type: ignore[dict-item]
        return {f"{self.name}.{part}": value for part, value in zip("qkv", self.node.inputs, strict=False)}  # type: ignore[misc]


def find(model: ir.Model, products: str, attention: bool = True) -> list[Layer]:
    """The products that can be quantized, in the order of the graph.

    `products`: pattern of the names of the linear layers among them (see `ExportFamily.products`).
    """
    linear = re.compile(rf"^(?P<name>(.+\.)?({products}))\.weight\.T$")
    layers = []
    for node in model.graph:
        if node.op_type == "MatMul":
            weight = _weight_of(node)
        elif attention and node.op_type == "Attention" and _is_plain(node):
            weight = _weight_behind(node.outputs[0])
        else:
            continue
        match = linear.match(weight.name or "") if weight is not None else None
        if match and weight is not None and weight.shape is not None:
            product = node.op_type == "MatMul"
            name = match["name"] if product else match["name"].rpartition(".")[0] + ATTENTION
            layers.append(Layer(name, node, int(weight.shape[1 if product else 0])))  # type: ignore[arg-type]
    return layers


def _weight_of(product: ir.Node) -> ir.Value | None:
    weight = product.inputs[1]
    return weight if weight is not None and weight.is_initializer() else None


def _weight_behind(value: ir.Value) -> ir.Value | None:
    """The weight of the only linear layer that takes in `value`, behind casts; None if there is none.

    An attention is known by it and not by what makes v, which in a Transition Model may come from the other graph.
    """
    while len(users := tuple(value.consumers())) == 1:
        if users[0].op_type == "MatMul":
            return _weight_of(users[0])
        if users[0].op_type != "Cast":
            return None
        value = users[0].outputs[0]
    return None


def _is_plain(node: ir.Node) -> bool:
    """Whether it is softmax(scale q k^T) v with as many heads on both sides."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    heads = attributes.pop("q_num_heads", None)
    attributes.pop("scale", None)
    return (
        bool(heads)
        and attributes.pop("kv_num_heads", heads) == heads
        and not any(node.inputs[3:])
        and len(node.outputs) == 1
        and all(PLAIN_ATTENTION.get(name) == value for name, value in attributes.items())
    )
