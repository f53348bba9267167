"""Which attentions NVIDIA's builder has a fused kernel for, asked of it once and written down.

An `Attention` is fused, or the build fails, unless it is marked as one that may be taken apart. What was asked, of
TensorRT for RTX 1.7.1 and for every compute capability from 7.5 to 12.1 (`tests/unit/engines/test_tensorrt_builds.py`
asks again), with and without a mask, self and cross attention:

    element type   width of a head     one row of one head          several
    float32        any                 no                           no
    float16,       up to 8             no                           no
    bfloat16 *     9 to 256            from 2^24 scores on          yes
                   from 257 on         no                           no

* except on compute capability 7.5, which has no bfloat16. "One row of one head" is batch times heads of 1. For a range
of sizes the largest counts.

A marked attention that has a fused kernel gets it all the same (12 heads of 128, 32,760 tokens: no scratch memory for
scores either way), so marking one too many costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cost.shapes import infer_shapes

if TYPE_CHECKING:
    import onnx

NARROWEST_HEAD, WIDEST_HEAD = 9, 256
SCORES_OF_ONE_HEAD = 1 << 24


def is_fused(dtype: int, query: tuple[int, ...], key: tuple[int, ...]) -> bool:
    """Whether there is a fused kernel, by the ONNX element type and the shapes `[batch, heads, rows, width]`."""
    from onnx import TensorProto

    batch, heads, rows, width = query
    return (
        dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        and NARROWEST_HEAD <= width <= WIDEST_HEAD
        and (batch * heads > 1 or rows * key[2] >= SCORES_OF_ONE_HEAD)
    )


def mark_decomposable(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Lets TensorRT take attention apart where it has no fused kernel for it. Returns how many nodes it marked.

    `shapes` are the largest of the inputs. The attribute is the parser's own (onnx-tensorrt, importer of Attention):
    onnx.checker, shape inference and ONNX Runtime refuse a model that has it, so this is the last change to a graph.
    """
    from onnx import helper

    nodes = [node for node in model.graph.node if node.op_type == "Attention"]
    tensors = infer_shapes(model, shapes, model.graph.name).tensors if nodes else {}
    marked = 0
    for node in nodes:
        query, key = (tensors.get(name) for name in node.input[:2])
        known = query is not None and key is not None and len(query.shape) == len(key.shape) == 4
        if not known or not is_fused(query.dtype, query.shape, key.shape):  # type: ignore[union-attr]
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
            marked += 1
    return marked
