"""The convolutions of a decoder in int8: which of them, how their weights are written, and the rewriting of a graph.

    x - Quantize - Dequantize - Conv(., Dequantize(weight)) - Cast to float32 - Add(bias)

with one scale per activation and one per output channel of a weight, both in the type of the product. It is the form
of the linear layers (see `qdq`), with the output channels of a weight in front. The bias stands behind the product and
in float32: OpenVINO 2026.4 takes a bias in bfloat16 into an int8 convolution that computes something else, without a
word, and ten times as slowly (`tests/unit/export/test_convolutions_int8.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..weights.precision import DTYPES
from ..weights.storage import IR_NAMES
from ..weights.weights import SMALL, Weights
from .format import Form
from .formats import INT8
from .nodes import add, constant
from .nodes import weight as new_weight
from .scaled import SCALES, VALUES, Scaled
from .weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

_WEIGHT = re.compile(r"\.weight$")


class ConvolutionInt8(Scaled):
    """`Scaled`, for weights `[O, I, ...]` whose channels come first."""

    def parts(self, shape: torch.Size, dtype: torch.dtype) -> dict[str, Form]:
        """See `Format.parts`."""
        return {VALUES: (shape, self.dtype), SCALES: (shape[:1], dtype)}

    def stored(self, parts: Mapping[str, ir.Value], name: str, before: ir.Node, dtype: torch.dtype) -> ir.Value:
        """See `Format.stored`."""
        return add("DequantizeLinear", [parts[VALUES], parts[SCALES]], f"{name}.dequantized", before, axis=0)

    def scales(self, pieces: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
        """See `Format.scales`."""
        largest = torch.cat([piece.flatten(1).abs().amax(1) for piece in pieces])
        return torch.where(largest > 0, largest / self.largest, 1.0).to(dtype)

    def chunks(self, part: str, pieces: Iterable[Tensor], scales: Tensor) -> Iterator[Tensor]:
        """See `Format.chunks`."""
        if part == SCALES:
            yield scales
            return
        start = 0
        for piece in pieces:
            own = scales[start : start + len(piece)].float()
            start += len(piece)
            yield self.round(piece / own.view(-1, *(1,) * (piece.ndim - 1))).contiguous()

    def rounded_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` as a graph in `dtype` dequantizes it, in float32."""
        scales = self.scales([weight], dtype)
        (values,) = self.chunks(VALUES, [weight], scales)
        return values.float() * scales.float().view(-1, *(1,) * (weight.ndim - 1))

    def rounded(self, x: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
        """The activation `x` as a graph in `dtype` rounds it, in float32."""
        scale = torch.tensor(largest / self.largest or 1.0).to(dtype).float()
        return self.round(x.to(dtype).float() / scale).float() * scale


FORMAT = ConvolutionInt8(INT8.headroom, False, INT8.budget, INT8.onnx, INT8.dtype, INT8.largest)


def convolutions(module: nn.Module) -> dict[str, nn.Module]:
    """The layers of `module`, the lowered module of a graph, that int8 is for, by name.

    Those that look at more than one pixel or frame: they are nearly all operations of a decoder. The first and the last
    one, whose rounding a picture shows, stay float32 as in every precision (`weights.precision`).
    """
    low = DTYPES["int8"]
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Conv3d)
        and layer.weight.dtype == low
        and layer.weight.numel() > SMALL
        and layer.weight[0, 0].numel() > 1
        and layer.groups == 1
    }


def quantize_convolutions(model: ir.Model, weights: Weights, ranges: Mapping[str, float]) -> QuantizedWeights:
    """Puts the convolutions named in `ranges` into int8, in place; returns what to write as the graph's weights.

    `ranges`: layer -> largest absolute value of its input.
    """
    graph, formats = model.graph, {}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "Conv" else None
        name = _WEIGHT.sub("", weight.name or "") if weight is not None else ""
        x = node.inputs[0]
        if weight is None or x is None or name not in ranges:
            continue
        stored = weight.name or name
        shape, dtype = weights.form(stored)
        node.replace_input_with(0, FORMAT.activation(graph, x, name, FORMAT.headroom * ranges[name], node, dtype))
        parts = {
            part: new_weight(graph, stored + part, IR_NAMES[kind], tuple(size))
            for part, (size, kind) in FORMAT.parts(shape, dtype).items()
        }
        node.replace_input_with(1, FORMAT.stored(parts, stored, node, dtype))
        del graph.initializers[stored]
        formats[stored] = FORMAT
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            _add_behind(graph, node, node.inputs[2], len(shape) - 2, name)
    model.ir_version = max(model.ir_version, FORMAT.ir_version)
    return QuantizedWeights(weights, formats)


def _add_behind(graph: ir.Graph, node: ir.Node, bias: ir.Value, sides: int, name: str) -> None:
    """Moves the bias of the convolution `node`, over so many `sides`, into a float32 sum behind it."""
    import onnx_ir as ir

    product, dtype = node.outputs[0], bias.dtype
    users = list(product.consumers())
    node.resize_inputs(2)
    after = next(graph[place + 1] for place, each in enumerate(graph) if each is node)
    shape = constant(graph, f"bias_{sides}", np.array([1, -1] + [1] * sides))
    wide = add("Cast", [bias], f"{name}.bias_wide", after, to=ir.DataType.FLOAT)
    column = add("Reshape", [wide, shape], f"{name}.bias_column", after)
    value = add("Cast", [product], f"{name}.product_wide", after, to=ir.DataType.FLOAT)
    total = add("Add", [value, column], f"{name}.sum", after)
    others = []
    for user in users:  # nearly all of them want float32
        if user.op_type == "Cast" and user.attributes["to"].as_int() == ir.DataType.FLOAT:
            user.outputs[0].replace_all_uses_with(total)
            graph.remove(user, safe=True)
        else:
            others.append(user)
    if others and dtype is not None:
        back = add("Cast", [total], f"{name}.sum_narrow", after, to=dtype)
        for user in others:
            for place, given in enumerate(user.inputs):
                if given is product:
                    user.replace_input_with(place, back)
