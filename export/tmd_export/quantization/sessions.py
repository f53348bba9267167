"""Sessions of ONNX Runtime that measure: node by node as the graph says, with weights read when they are used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tmd_engines.onnxruntime.lowering import attention_to_multi_head_attention

if TYPE_CHECKING:
    import onnx_ir as ir


def open_session(model: ir.Model, folder: Path) -> Any:
    """`model`, with data files in `folder`, as a session that neither copies nor packs its weights."""
    import onnx_ir as ir
    import onnxruntime

    proto = ir.to_proto(model)
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
