"""Sessions of ONNX Runtime that measure: node by node as the graph says, with weights read when they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmd_engines.onnxruntime.float4 import float4_to_float8
from tmd_engines.onnxruntime.lowering import attention_to_multi_head_attention

from .nodes import add, constant

if TYPE_CHECKING:
    import onnx_ir as ir


def open_session(model: ir.Model, folder: Path) -> Any:
    """`model`, with data files in `folder`, as a session that neither copies nor packs its weights."""
    import onnx_ir as ir
    import onnxruntime

    _dequantize_late(model.graph)
    proto = ir.to_proto(model)
    float4_to_float8(proto)
    attention_to_multi_head_attention(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    # In the order of the file: optimizers move nodes behind all that can start at once, and these are the weights.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (
        ("model_external_initializers_file_folder_path", str(folder)),
        ("disable_prepacking", "1"),  # which copies every weight
        ("intra_op.allow_spinning", "0"),  # threads that wait take processor time from each other
    ):
        options.add_session_config_entry(f"session.{key}", value)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _dequantize_late(graph: ir.Graph) -> None:
    """Makes each weight's scale wait for the other operand of its product, by adding a zero that is made of its shape.

    A DequantizeLinear that waits for nothing runs first, and all weights would be there in float32 at once.
    """
    for node in list(graph):
        weight, scale = node.outputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type != "DequantizeLinear" or scale is None or not scale.is_initializer():
            continue
        products = [user for user in weight.consumers() if user.op_type == "MatMul" and user.inputs[1] is weight]
        if not products or not (node.inputs[0] and node.inputs[0].is_initializer()):
            continue
        shape = add("Shape", [products[0].inputs[0]], f"{weight.name}/shape", node)  # type: ignore[list-item]
        sizes = add("Cast", [shape], f"{weight.name}/sizes", node, to=1)
        least = add("ReduceMin", [sizes], f"{weight.name}/least", node, keepdims=0)
        zero = constant(graph, "sessions.zero", np.zeros((), np.float32))
        nothing = add("Mul", [least, zero], f"{weight.name}/nothing", node)
        node.replace_input_with(1, add("Add", [scale, nothing], f"{weight.name}/scale", node))
