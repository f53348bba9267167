"""The rules of an exported graph, which every written file is checked for; its weights are not read.

docs/bundle.md and the engines give the reasons: each engine refuses or slows down something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tmd_engines import TensorSpec
from tmd_engines.bundle.float4 import BLOCK, BLOCK_SCALES, FLOAT4, find_blocks, makes_float4
from tmd_engines.bundle.operators import OPERATORS

from ..errors import ExportError
from ..weights.storage import INLINE_BYTES
from .trace import OPSET

if TYPE_CHECKING:
    import onnx


def lint(path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> int:
    """Number of nodes of the graph `path`. Raises ExportError with the first rule that it breaks."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for check in CHECKS:
        problem = next(check(model, path.name, inputs, outputs), None)
        if problem:
            raise ExportError(f"{path.name}: {problem}.")
    return len(model.graph.node)


Problems = Iterator[str]
Specs = tuple[TensorSpec, ...]


def one_opset(model: onnx.ModelProto, *_: object) -> Problems:
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found != {"ai.onnx": OPSET}:
        yield f"it imports {found}, and a bundle has opset {OPSET} of the standard domain alone"


def no_functions(model: onnx.ModelProto, *_: object) -> Problems:
    if model.functions:
        yield f"it defines the function {model.functions[0].name}: functions must be inlined"


def allowed_operators(model: onnx.ModelProto, *_: object) -> Problems:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            yield (
                f"node {node.name} is {'.'.join(filter(None, (node.domain, node.op_type)))}, which not every engine "
                "runs: write the module so that it exports to the operators of tmd_engines.bundle.operators"
            )
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            yield f"node {node.name} has a graph of its own"


def canonical_attention(model: onnx.ModelProto, *_: object) -> Problems:
    """3-D attention and interleaved rotation, what the lowerings of the engines recognise; softmax sums in float32."""
    from onnx import TensorProto, helper

    low = any(weight.data_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for weight in model.graph.initializer)
    for node in model.graph.node:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Attention":
            heads = attributes.get("q_num_heads", 0)
            if not heads or attributes.get("kv_num_heads") != heads:
                yield f"node {node.name} is not attention in its 3-D form with q_num_heads = kv_num_heads"
            if attributes.get("is_causal") or any(node.output[1:]) or any(node.input[4:]):
                yield f"node {node.name} is causal attention or one with caches"
            if low and attributes.get("softmax_precision") != TensorProto.FLOAT:
                yield f"node {node.name} sums the exponentials of its softmax in low precision"
        if node.op_type == "RotaryEmbedding" and not (attributes.get("interleaved") and attributes.get("num_heads")):
            yield f"node {node.name} is not an interleaved rotary embedding of 3-D tensors"


_CHANNELS = {"MatMul": 1, "Conv": 0}  # product -> axis of its weight that has the output's channels


def quantization(model: onnx.ModelProto, *_: object) -> Problems:
    """What TensorRT asks of QuantizeLinear and DequantizeLinear, so that nothing is read as something else.

    A zero point names the type (without one it would be INT8) and is zero; one scale per activation, in its type; one
    per channel of a weight, whose values go straight into a product. (The text encoder's int8 weights are for CPUs,
    with a scale per block.)
    """
    weights = {weight.name: weight for weight in model.graph.initializer}
    users = {name: node for node in model.graph.node for name in node.input}
    products = {weight.data_type for weight in weights.values() if weight.name.endswith(".scale")}
    of_blocks = set(_of_blocks(model))
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.output[0] in of_blocks:
            continue
        if any(name not in weights for name in node.input[1:]):
            yield f"node {node.name} has a scale or zero point that is computed"
            continue
        scale, weight = weights[node.input[1]], weights.get(node.input[0])
        if weight is None:
            if len(node.input) < 3 or any(weights[node.input[2]].raw_data):
                yield f"node {node.name} has no zero point, or one that is not zero"
            if list(scale.dims):
                yield f"node {node.name} has {list(scale.dims)} scales for an activation, which has one"
            if products and scale.data_type not in products:
                yield f"node {node.name} has a scale in another type than its product"
        elif users[node.output[0]].op_type not in _CHANNELS:
            yield f"the weight of node {node.name} goes into {users[node.output[0]].op_type}, not into a product"
        elif len(scale.dims) == 1 and scale.dims[0] != (
            channels := weight.dims[_CHANNELS[users[node.output[0]].op_type]]
        ):
            yield f"node {node.name} has {scale.dims[0]} scales for {channels} channels"


def float4(model: onnx.ModelProto, *_: object) -> Problems:
    """Float4 in the form that the engines recognise (see `tmd_engines.bundle.float4`), and nowhere else."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    users = {name: node for node in model.graph.node for name in node.input}
    known = {blocks.values.output[0] for blocks in find_blocks(model)}
    for node in model.graph.node:
        if makes_float4(node) and node.output[0] not in known:
            yield f"node {node.name} quantizes to float4 in another form than blocks with scales found while running"
    for weight in weights.values():
        if weight.data_type != FLOAT4:
            continue
        node = users[weight.name]
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "DequantizeLinear" or numbers != {"axis": 0, "block_size": BLOCK}:
            yield f"the weight {weight.name} is not dequantized in blocks of {BLOCK} along its first axis"
        elif users[node.output[0]].op_type != "MatMul":
            yield f"the weight of node {node.name} goes into {users[node.output[0]].op_type}, not into a product"


def _of_blocks(model: onnx.ModelProto) -> Iterator[str]:
    """The outputs of nodes that have scales of blocks or make them, which have rules of their own."""
    weights = {weight.name: weight for weight in model.graph.initializer}
    found = {name for blocks in find_blocks(model) for name in (blocks.scales.output[0], blocks.values.output[0])}
    yield from found
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            source = weights.get(node.input[0])
            is_part = source is not None and (source.data_type == FLOAT4 or source.name.endswith(BLOCK_SCALES))
            if is_part or node.input[0] in found:
                yield node.output[0]


def one_data_file(model: onnx.ModelProto, name: str, *_: object) -> Problems:
    """Weights in `<graph>.onnx.data`, only shapes and scalars in the graph itself."""
    from tmd_engines.bundle.graph_file import external_tensors

    for tensor in external_tensors(model):
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), None)
        if location != f"{name}.data":
            yield f"the weight {tensor.name} lies in {location!r} and not in {name}.data"
    for tensor in model.graph.initializer:
        if not tensor.external_data and tensor.ByteSize() > INLINE_BYTES + 256:  # 256 for its name and dimensions
            yield f"the weight {tensor.name} lies in the graph itself and not in {name}.data"
    if model.graph.sparse_initializer:
        yield "it has sparse weights"


def interface(model: onnx.ModelProto, _: str, inputs: Specs, outputs: Specs) -> Problems:
    """Names, order, types and sizes as the manifest states them, symbols included; every input in use."""
    for kind, values, specs in (("inputs", model.graph.input, inputs), ("outputs", model.graph.output, outputs)):
        found, stated = [_describe(value) for value in values], [(s.name, s.dtype, s.shape) for s in specs]
        for have, want in zip(found, stated, strict=False):
            if have != want:
                yield f"among its {kind} is {_show(have)} where {_show(want)} is documented"
        if len(found) != len(stated):
            yield f"it has {len(found)} {kind} where {len(stated)} are documented"
    used = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    for value in model.graph.input:
        if value.name not in used:
            yield f"its input {value.name} has no effect"


def no_notes(model: onnx.ModelProto, *_: object) -> Problems:
    """Nothing about the machine that exported: torch notes a stack trace with every node."""
    parts = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output]
    for part in parts:
        if part.doc_string or part.metadata_props:
            yield f"{getattr(part, 'name', '') or 'the model'} carries notes of the exporter"


CHECKS: tuple[Callable[..., Problems], ...] = (
    one_opset,
    no_functions,
    allowed_operators,
    canonical_attention,
    quantization,
    float4,
    one_data_file,
    interface,
    no_notes,
)


def _describe(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    from onnx import helper

    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name if tensor.elem_type else "nothing"
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in tensor.shape.dim)
    return value.name, dtype, shape


def _show(tensor: tuple[str, str, tuple[int | str, ...]]) -> str:
    name, dtype, shape = tensor
    return f"{name} {dtype}[{', '.join(map(str, shape))}]"
