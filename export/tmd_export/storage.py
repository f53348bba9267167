"""How the weights of a graph are stored: in float32, or in float16 with a Cast to float32 behind each.

Only the file gets smaller. The arithmetic stays float32, and engines undo the Cast once, when they load the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

STORAGES = ("fp32", "fp16")
SMALL = 1024  # elements; up to here a tensor (norms, biases) is not worth a node


def store_float16(model: ir.Model) -> int:
    """Makes every float32 weight of more than `SMALL` elements float16 with a Cast; returns how many values changed.

    Nothing changes (0) if the values came from float16. Raises ExportError if a value is beyond float16's 65504.
    """
    import onnx_ir as ir

    changed = 0
    start = model.graph[0]
    for weight in list(model.graph.initializers.values()):
        tensor = weight.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size <= SMALL or not weight.uses():
            continue
        changed += _rounded(tensor)
        # Lazy: a model of 28 GB must not lie in memory in both precisions.
        half = ir.LazyTensor(
            lambda tensor=tensor: ir.tensor(_half(tensor), name=tensor.name),  # type: ignore[misc]
            dtype=ir.DataType.FLOAT16,
            shape=ir.Shape(tensor.shape.numpy()),
            name=weight.name,
        )
        cast = ir.node("Cast", [weight], attributes={"to": ir.DataType.FLOAT}, name=f"node_fp32_{weight.name}")
        cast.outputs[0].name = f"{weight.name}.fp32"
        for node, index in tuple(weight.uses()):
            if node is not cast:
                node.replace_input_with(index, cast.outputs[0])
        weight.const_value = half
        weight.dtype = ir.DataType.FLOAT16
        model.graph.insert_before(start, cast)
    return changed


def _half(tensor: ir.TensorProtocol) -> np.ndarray:
    with np.errstate(over="ignore"):
        return tensor.numpy().astype(np.float16)


def _rounded(tensor: ir.TensorProtocol) -> int:
    """How many values float16 does not hold exactly."""
    full, half = tensor.numpy(), _half(tensor)
    if np.isinf(half).any() and np.isfinite(full).all():
        raise ExportError(
            f"the weight {tensor.name} has values up to {np.abs(full).max():.3g}, and float16 ends at 65504: "
            "store the weights as fp32 (--weights fp32)."
        )
    return int(np.count_nonzero(half.astype(np.float32) != full))
