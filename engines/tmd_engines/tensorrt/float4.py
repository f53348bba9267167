"""Quantization to float4 as NVIDIA's parser takes it: one operator of its own for values and scales of an activation.

`TRT_FP4DynamicQuantize(x, scale)` computes what the nodes in the bundle say (`bundle.float4`). Weights stay as they
are: the parser reads float4 and the scales of their blocks. Neither onnx.checker nor shape inference knows the
operator, so this is the last change to a graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bundle.float4 import BLOCK, FLOAT4, FLOAT8, find_blocks, makes_float4
from ..errors import EngineError, quote

if TYPE_CHECKING:
    import onnx

DOMAIN = "trt"  # of the operators that are NVIDIA's own
SINCE = (11, 0)  # whose parser was asked: that of TensorRT for RTX


def check_version(model: onnx.ModelProto, version: tuple[int, int], where: str) -> None:
    """Raises EngineError if the graph has float4 and TensorRT `version` is older than `SINCE`."""
    if version < SINCE and _has_float4(model):
        raise EngineError(
            f"{where} is nvfp4, which takes TensorRT {SINCE[0]} or TensorRT for RTX, and this is TensorRT {version[0]}."
            f"{version[1]}: use a bundle in fp8 or bf16."
        )


def use_dynamic_quantize(model: onnx.ModelProto, where: str) -> int:
    """Replaces every quantization of an activation to float4, in place. Returns how many.

    Raises EngineError for a quantization in another form than a bundle's.
    """
    from onnx import helper

    graph = model.graph
    if not _has_float4(model):
        return 0
    found = find_blocks(model)
    known = {blocks.values.output[0]: blocks for blocks in found}
    at = {blocks.scales.output[0]: blocks for blocks in found}
    nodes = []
    for node in graph.node:
        blocks = at.get(node.output[0])
        if blocks is not None:
            outputs = [blocks.values.output[0], node.output[0]]
            made = helper.make_node("TRT_FP4DynamicQuantize", [blocks.x, blocks.scale], outputs, domain=DOMAIN)
            made.name = f"lowered/{node.output[0]}"
            for name, value in (("axis", -1), ("block_size", BLOCK), ("scale_type", FLOAT8)):
                made.attribute.append(helper.make_attribute(name, value))
            nodes.append(made)
        elif node.output[0] not in known:
            if makes_float4(node):
                raise EngineError(
                    f"{where}: node {quote(node.name)} quantizes to float4 in a form that TensorRT has no operator "
                    "for. Make the bundle again with tmd-export."
                )
            nodes.append(type(node).FromString(node.SerializeToString()))
    _replace(graph, nodes)
    model.opset_import.add(domain=DOMAIN, version=1)
    return len(found)


def _has_float4(model: onnx.ModelProto) -> bool:
    return any(weight.data_type == FLOAT4 for weight in model.graph.initializer) or any(
        map(makes_float4, model.graph.node)
    )


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Puts `nodes` into the graph, without those whose results nobody uses any more."""
    used = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if used & set(node.output):
            used |= set(node.input)
            kept.append(node)
    del graph.node[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
