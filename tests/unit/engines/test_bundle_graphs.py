"""A graph keeps to its own data file, wherever it hides a tensor, and is what the manifest says of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.helpers.bundle_tools import Edit, edit_graph, edit_manifest, refused, reseal
from tmd_engines import Bundle, BundleError
from tmd_engines.bundle.graph_file import external_tensors


def first_external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def set_external(tensor: onnx.TensorProto, **entries: str) -> None:
    found = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in found.items():
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = TensorProto.EXTERNAL


@pytest.mark.parametrize(
    "location",
    [
        "../secret",
        "/etc/passwd",
        "tokenizer.model",
        "flow_head.onnx.data",
        "./backbone.onnx.data",
        "",
        "*/_ORT_MEM_ADDR_/*",  # ONNX Runtime's own mark for "at this address in memory"
    ],
)
def test_external_data_naming_another_file(synthetic_bundle: Path, location: str) -> None:
    edit_graph(synthetic_bundle, lambda model: set_external(first_external(model), location=location))
    assert "only 'backbone.onnx.data' is allowed" in refused(synthetic_bundle)


def test_external_data_without_location(synthetic_bundle: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        del first_external(model).external_data[:]

    edit_graph(synthetic_bundle, edit)
    assert "only 'backbone.onnx.data' is allowed" in refused(synthetic_bundle)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"offset": "-1"}, "offset"),
        ({"offset": "1e9"}, "offset"),
        ({"length": "\u0663"}, "length"),
        ({"offset": "9" * 30}, "offset"),
        ({"offset": "28900", "length": "4096"}, "ends at byte 32996"),
    ],
)
def test_external_data_outside_its_file(synthetic_bundle: Path, entries: dict[str, str], said: str) -> None:
    edit_graph(synthetic_bundle, lambda model: set_external(first_external(model), **entries))
    assert said in refused(synthetic_bundle)


def test_external_data_stated_twice(synthetic_bundle: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        first_external(model).external_data.add(key="location", value="backbone.onnx.data")

    edit_graph(synthetic_bundle, edit)
    assert "twice" in refused(synthetic_bundle)


def test_external_data_of_a_graph_without_data_file(synthetic_bundle: Path) -> None:
    edit_manifest(synthetic_bundle, lambda document: document["graphs"]["backbone"].update(data=None))
    assert "names no data file" in refused(synthetic_bundle)


def outside() -> onnx.TensorProto:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[1])
    set_external(tensor, location="/etc/passwd")
    return tensor


def hide_in(place: str, model: onnx.ModelProto) -> None:
    """Puts a tensor with external data into one of the places where the format allows tensors."""
    graph = model.graph
    node = helper.make_node("Constant", [], ["hidden"])
    inner = helper.make_graph([], "inner", [], [], [outside()])
    if place == "initializer":
        graph.initializer.append(outside())
    elif place == "sparse initializer":
        graph.sparse_initializer.add().values.CopyFrom(outside())
    elif place == "sparse indices":
        graph.sparse_initializer.add().indices.CopyFrom(outside())
    elif place == "function":
        function = model.functions.add(name="f", domain="d")
        function.node.append(node)
        function.node[0].attribute.append(helper.make_attribute("value", outside()))
    elif place == "training":
        model.training_info.add().initialization.initializer.append(outside())
    else:
        attribute = onnx.AttributeProto(name="value")
        if place == "attribute":
            attribute.type = onnx.AttributeProto.TENSOR
            attribute.t.CopyFrom(outside())
        elif place == "attribute list":
            attribute.type = onnx.AttributeProto.TENSORS
            attribute.tensors.append(outside())
        elif place == "sparse attribute":
            attribute.type = onnx.AttributeProto.SPARSE_TENSOR
            attribute.sparse_tensor.values.CopyFrom(outside())
        elif place == "subgraph":
            attribute.type = onnx.AttributeProto.GRAPH
            attribute.g.CopyFrom(inner)
        elif place == "subgraph list":
            attribute.type = onnx.AttributeProto.GRAPHS
            attribute.graphs.append(inner)
        node.attribute.append(attribute)
        graph.node.append(node)


PLACES = (
    "initializer",
    "sparse initializer",
    "sparse indices",
    "function",
    "training",
    "attribute",
    "attribute list",
    "sparse attribute",
    "subgraph",
    "subgraph list",
)


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_it_hides(synthetic_bundle: Path, place: str) -> None:
    edit_graph(synthetic_bundle, lambda model: hide_in(place, model))
    model = onnx.load(synthetic_bundle / "backbone.onnx", load_external_data=False)
    assert "hidden" in [tensor.name for tensor in external_tensors(model)]
    refused(synthetic_bundle)


def test_external_data_marked_as_inline_is_refused_too(synthetic_bundle: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        set_external(first_external(model), location="/etc/passwd")
        first_external(model).data_location = TensorProto.DEFAULT

    edit_graph(synthetic_bundle, edit)
    assert "'/etc/passwd'" in refused(synthetic_bundle)


def test_graph_that_is_no_onnx_file(synthetic_bundle: Path) -> None:
    (synthetic_bundle / "backbone.onnx").write_bytes(b"not a protobuf at all")
    reseal(synthetic_bundle)
    assert "not an ONNX file" in refused(synthetic_bundle)


def test_graph_nested_without_end(synthetic_bundle: Path) -> None:
    """The protobuf parser refuses what would exhaust the stack."""

    def wrapped(field: int, content: bytes) -> bytes:
        size, head = len(content), bytearray([field << 3 | 2])
        while size > 127:
            head.append(size & 127 | 128)
            size >>= 7
        return bytes([*head, size]) + content

    for depth, said in ((20, "other operators than the standard ones"), (2000, "not an ONNX file")):
        graph = b""
        for _ in range(depth):
            graph = wrapped(1, wrapped(5, wrapped(6, graph)))  # GraphProto.node, NodeProto.attribute, AttributeProto.g
        (synthetic_bundle / "backbone.onnx").write_bytes(wrapped(7, graph))
        reseal(synthetic_bundle)
        assert said in refused(synthetic_bundle)


def test_oversized_graph_file(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_engines.bundle.reader.MAX_GRAPH_BYTES", 1000)
    assert "weights belong" in refused(synthetic_bundle)


def test_too_many_nodes(synthetic_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_engines.bundle.graph_file.MAX_NODES", 3)
    monkeypatch.setenv("TMD_CACHE", "off")  # with other limits it passed before
    assert "nodes" in refused(synthetic_bundle)


def test_graph_with_functions(synthetic_bundle: Path) -> None:
    edit_graph(synthetic_bundle, lambda model: model.functions.add(name="f", domain="d"))
    assert "functions" in refused(synthetic_bundle)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda graph: graph.update(opset=22), "opset 23, the manifest says 22"),
        (lambda graph: graph["inputs"].reverse(), "inputs differ"),
    ],
)
def test_manifest_and_graph_must_agree(synthetic_bundle: Path, edit: Edit, said: str) -> None:
    edit_manifest(synthetic_bundle, lambda document: edit(document["graphs"]["backbone"]))
    assert said in refused(synthetic_bundle)


def typed(dtype: int, *shape: int | str) -> Callable[[onnx.ModelProto], None]:
    """Makes the first input of a graph, x, one of this type and shape."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", dtype, shape))

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda model: model.graph.output.pop(), "outputs differ"),
        (typed(TensorProto.FLOAT16, "batch", 16, "frames", "height", "width"), "x is float16 in the file"),
        (typed(TensorProto.FLOAT, "batch", 8, "frames", "height", "width"), "x has shape"),
        (typed(TensorProto.FLOAT, "batch", 16), "x has shape"),
    ],
)
def test_graph_and_manifest_must_agree(
    synthetic_bundle: Path, edit: Callable[[onnx.ModelProto], None], said: str
) -> None:
    edit_graph(synthetic_bundle, edit)
    assert said in refused(synthetic_bundle)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzz_damaged_graph_never_escapes(synthetic_bundle: Path, data: st.DataObject) -> None:
    path = synthetic_bundle / "text_encoder.onnx"
    original = path.read_bytes()
    content = bytearray(original)
    try:
        for _ in range(data.draw(st.integers(1, 3))):
            start = data.draw(st.integers(0, len(content) - 1))
            content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
        path.write_bytes(content)
        reseal(synthetic_bundle)
        with contextlib.suppress(BundleError):
            Bundle.open(synthetic_bundle)
    finally:
        path.write_bytes(original)
        reseal(synthetic_bundle)
