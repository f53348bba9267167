"""Checks of one ONNX file before an engine sees it: weights only from its own data file, interface as in the manifest.

The protobuf is parsed with the `onnx` package, never with its loader: that one opens external data on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, quote
from ..utf8 import is_utf8
from .operators import check_operators
from .sections import GraphInfo, TensorSpec

if TYPE_CHECKING:
    import onnx

MAX_GRAPH_BYTES = 16 << 20  # weights belong into the data file; Wan 14B's graph without weights is about 4 MB
MAX_NODES = MAX_WEIGHTS = 1 << 15  # Wan 14B in fp8 has about 8,000 nodes per graph

_REMEDY = "Make the bundle again with tmd-export, and do not run graphs from elsewhere."


def parse_graph(data: bytes, where: str) -> onnx.ModelProto:
    """The protobuf of an ONNX file; external data is not touched. Raises BundleError.

    The bytes must be the one canonical encoding of what they say: fields in the order of their numbers, each singular
    one once, nothing unknown, numbers as short as they go. Other encodings can mean different things to two parsers,
    and an engine has a parser of its own.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
        model.DiscardUnknownFields()
        canonical = model.SerializeToString(deterministic=True)
    except (DecodeError, UnicodeDecodeError):
        raise BundleError(f"{where} is not an ONNX file, though its sha256 is right. {_REMEDY}") from None
    if canonical != data or not _is_text(model):
        raise BundleError(
            f"{where} is not encoded as tmd-export encodes a graph, and could be read in two ways. {_REMEDY}"
        )
    return model


def _is_text(message: Any) -> bool:
    """Whether every text below `message` is UTF-8; the parser gives others as bytes."""
    from google.protobuf.message import Message

    for field, value in message.ListFields():
        parts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else (value,)
        if field.type == field.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            return False
        if field.message_type is not None and not all(_is_text(part) for part in parts if isinstance(part, Message)):
            return False
    return True


def check_graph(model: onnx.ModelProto, info: GraphInfo, data_size: int, where: str) -> None:
    """Raises BundleError unless `model` keeps to its own data file of `data_size` bytes and is what `info` says."""
    counts = (("nodes", len(model.graph.node), MAX_NODES), ("weights", len(model.graph.initializer), MAX_WEIGHTS))
    for what, count, limit in counts:
        if count > limit:
            raise BundleError(f"{where} has {count} {what}, more than {limit}. {_REMEDY}")
    if model.functions:
        # Chains of functions are expanded by recursion inside the engines: a small file can exhaust the stack.
        raise BundleError(
            f"{where} defines functions of its own, which a bundle may not: export with functions inlined."
        )
    for tensor in external_tensors(model):
        problem = _external_problem(tensor, info.data, data_size)
        if problem:
            raise BundleError(f"{where}: tensor {quote(tensor.name)} {problem}. {_REMEDY}")
    unknown = check_operators(model)
    if unknown:
        raise BundleError(f"{where}: {unknown}. {_REMEDY}")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset != info.opset:
        raise BundleError(f"{where} has opset {opset}, the manifest says {info.opset}. {_REMEDY}")
    for kind, tensors, specs in (
        ("inputs", model.graph.input, info.inputs),
        ("outputs", model.graph.output, info.outputs),
    ):
        problem = _interface_problem(list(tensors), specs)
        if problem:
            raise BundleError(f"{where}: the {kind} differ from the manifest's: {problem}. {_REMEDY}")


def external_tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Those of `all_tensors` that name external data."""
    from onnx import TensorProto

    for tensor in all_tensors(message):
        if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def name_data(model: onnx.ModelProto, data: Path | None, folder: Path) -> Path:
    """Makes the weights of `model` name the file `data`, where it really is; returns its `data_folder`.

    The data file of a bundle may be a link, and engines refuse weights outside the folder that they are told.
    """
    found = data_folder(data, folder)
    if data is not None and is_utf8(data.name):
        for tensor in external_tensors(model):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
    return found


def data_folder(data: Path | None, folder: Path) -> Path:
    """Where an engine looks for a graph's weights: beside the file that they really are in, or in the bundle."""
    return folder if data is None or not is_utf8(data.name) else data.parent


def all_tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere below `message`: initializers, attributes, subgraphs, functions.

    Goes by the protobuf's own field list instead of a list of known places: a place that is forgotten is a hole.
    """
    from google.protobuf.message import Message
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None and _reaches_tensor(field.message_type):
            for part in (value,) if isinstance(value, Message) else value:
                yield from all_tensors(part)


@cache
def _reaches_tensor(descriptor: Any) -> bool:
    """Whether a message of this type can hold a TensorProto at some depth. Saves walking thousands of shapes."""
    seen: set[str] = set()
    waiting = [descriptor]
    while waiting:
        current = waiting.pop()
        if current.full_name == "onnx.TensorProto":
            return True
        if current.full_name not in seen:
            seen.add(current.full_name)
            waiting += [field.message_type for field in current.fields if field.message_type is not None]
    return False


def _external_problem(tensor: onnx.TensorProto, data_name: str | None, data_size: int) -> str | None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) != len(tensor.external_data):
        return "states an external-data field twice"
    location = entries.get("location")
    if data_name is None:
        return f"keeps its values in {quote(location)}, but the manifest names no data file for this graph"
    if location != data_name:
        return f"keeps its values in {quote(location)}, and only {quote(data_name)} is allowed"
    numbers = {}
    for key in ("offset", "length"):
        text = entries.get(key, "0")
        if not (text.isascii() and text.isdigit() and len(text) <= 15):
            return f"has the {key} {quote(text)}, which is not a byte count"
        numbers[key] = int(text)
    if numbers["offset"] + numbers["length"] > data_size:
        return f"ends at byte {numbers['offset'] + numbers['length']} of {quote(data_name)}, which has {data_size}"
    return None


def _interface_problem(tensors: list[onnx.ValueInfoProto], specs: tuple[TensorSpec, ...]) -> str | None:
    names, expected = [tensor.name for tensor in tensors], [spec.name for spec in specs]
    if names != expected:
        return f"the file has {quote(', '.join(names))}, the manifest {quote(', '.join(expected))}"
    for tensor, spec in zip(tensors, specs, strict=True):
        if not tensor.type.HasField("tensor_type"):
            return f"{spec.name} is not a tensor"
        dtype = _dtype_name(tensor.type.tensor_type.elem_type)
        if dtype != spec.dtype:
            return f"{spec.name} is {dtype} in the file and {spec.dtype} in the manifest"
        if not tensor.type.tensor_type.HasField("shape"):
            continue  # outputs may come without a shape; the engine then learns it from the manifest
        dims = tensor.type.tensor_type.shape.dim
        fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
        if len(fixed) != len(spec.shape) or any(
            have is not None and have != want for have, want in zip(fixed, spec.shape, strict=True)
        ):
            shown = [size or "?" for size in fixed]
            return f"{spec.name} has shape {shown} in the file and {list(spec.shape)} in the manifest"
    return None


def _dtype_name(elem_type: int) -> str:
    from onnx import helper

    try:
        return str(helper.tensor_dtype_to_np_dtype(elem_type).name)
    except KeyError:
        return f"of type {elem_type}"
