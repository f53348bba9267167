"""A graph of a bundle is made of what tmd-export writes, in the one encoding that two parsers read alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from google.protobuf.internal.encoder import _VarintBytes
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.built_in import BUNDLES
from tests.helpers.bundle_tools import edit_graph, refused, reseal
from tmd_engines import Bundle
from tmd_engines.bundle.graph_file import MAX_GRAPH_BYTES, MAX_WEIGHTS, parse_graph

Edit = Callable[[onnx.ModelProto], object]


def node(kind: str, *inputs: str, domain: str = "", **attributes: Any) -> Edit:
    made = helper.make_node(kind, inputs or ["x"], ["spare"], name="spare", domain=domain, **attributes)
    return lambda model: model.graph.node.append(made)


def weight(tensor: TensorProto) -> Edit:
    return lambda model: model.graph.initializer.append(tensor)


def plain(**changes: object) -> TensorProto:
    tensor = numpy_helper.from_array(np.zeros((2, 3), np.float32), "spare")
    for name, value in changes.items():
        if name == "dims":
            tensor.dims[:] = value
        else:
            setattr(tensor, name, value)
    return tensor


def two_values(model: onnx.ModelProto) -> None:
    node = next(
        each for each in model.graph.node if any(part.type == onnx.AttributeProto.INT for part in each.attribute)
    )
    next(part for part in node.attribute if part.type == onnx.AttributeProto.INT).f = 1.0


def twice_stored(model: onnx.ModelProto) -> None:
    tensor = plain()
    tensor.float_data.append(1.0)
    model.graph.initializer.append(tensor)


def body() -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "g", [], [])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        # what no size bounds
        (node("Loop", "n", "c", body=body()), "is 'Loop'"),
        (node("If", "c", then_branch=body(), else_branch=body()), "is 'If'"),
        (node("Scan", body=body(), num_scan_inputs=1), "is 'Scan'"),
        (node("ConstantOfShape"), "is 'ConstantOfShape'"),
        (node("NonZero"), "is 'NonZero'"),
        (node("Tile", "x", "n"), "is 'Tile'"),
        (node("Resize", "x"), "is 'Resize'"),
        (node("RandomNormal", shape=[1 << 40]), "is 'RandomNormal'"),
        # other people's operators and attributes
        (node("MultiHeadAttention", domain="com.microsoft"), "'com.microsoft.MultiHeadAttention'"),
        (node("Add", "x", "x", domain="evil"), "'evil.Add'"),
        (node("Relu", graph=body()), "has an attribute"),
        (node("Relu", axis=1), "has an attribute"),
        (node("Softmax", axis=helper.make_tensor("t", TensorProto.FLOAT, [1], [0.0])), "an attribute that is not"),
        (lambda model: model.graph.node[-1].attribute.extend([helper.make_attribute("axis", 1)] * 2), "an attribute"),
        (two_values, "an attribute that is not"),
        (lambda model: model.opset_import.add(domain="com.microsoft", version=1), "other operators than the standard"),
        (lambda model: model.graph.sparse_initializer.add(), "sparse weights"),
        (lambda model: model.training_info.add(), "training information"),
        # weights
        (weight(plain(data_type=TensorProto.STRING)), "has the type 8"),
        (weight(plain(data_type=0)), "has the type 0"),
        (weight(plain(data_type=99)), "has the type 99"),
        (weight(plain(dims=[1 << 20, 1 << 12])), "and its shape and type take 17179869184"),
        (weight(plain(data_type=TensorProto.FLOAT4E2M1)), "has 24 bytes, and its shape and type take 3"),
        (weight(plain(data_type=TensorProto.FLOAT4E2M1, dims=[3, 3])), "ends in half a byte"),
        (twice_stored, "other forms than bytes"),
        (weight(plain(dims=[-1, 3])), "impossible shape"),
        (weight(plain(dims=[1] * 9)), "impossible shape"),
        (
            weight(helper.make_tensor("low", TensorProto.BFLOAT16, [1], [1.5])),
            "other forms than bytes",
        ),  # OpenVINO misreads it
    ],
)
def test_what_tmd_export_does_not_write_is_refused(synthetic_bundle: Path, edit: Edit, message: str) -> None:
    edit_graph(synthetic_bundle, edit)
    assert message in refused(synthetic_bundle)


def test_float4_has_two_values_in_a_byte(synthetic_bundle: Path) -> None:
    edit_graph(synthetic_bundle, weight(plain(data_type=TensorProto.FLOAT4E2M1, raw_data=b"\x21\x43\x65")))
    Bundle.open(synthetic_bundle)


def varint(value: int, length: int) -> bytes:
    """A number in as many bytes."""
    return bytes([(value >> 7 * k & 127) | (128 if k + 1 < length else 0) for k in range(length)])


def field(number: int, content: bytes) -> bytes:
    return _VarintBytes(number << 3 | 2) + _VarintBytes(len(content)) + content


def encodings(data: bytes) -> dict[str, bytes]:
    """The same graph in other bytes, or bytes that one parser may take for it."""
    model = onnx.ModelProto.FromString(data)
    graph = model.graph.SerializeToString()
    head, tail = onnx.ModelProto(), onnx.ModelProto()
    head.CopyFrom(model)
    head.ClearField("graph")
    first, rest = onnx.GraphProto(), onnx.GraphProto()
    first.node.extend(model.graph.node[:3])
    rest.CopyFrom(model.graph)
    del rest.node[:3]
    tail.ir_version = model.ir_version
    without = head.SerializeToString()
    return {
        "graph in two messages": without + field(7, first.SerializeToString()) + field(7, rest.SerializeToString()),
        "graph at the end": without + field(7, graph),
        "version twice": data + tail.SerializeToString(),
        "long tag": data.replace(_VarintBytes(1 << 3), varint(1 << 3, 5), 1),
        "long number": varint(1 << 3, 1) + varint(model.ir_version, 10) + data[2:],
        "unknown field": data + field(500, b"x"),
        "unknown field of the graph": without + field(7, graph + field(500, b"x")),
        "group": data + _VarintBytes(60 << 3 | 3) + _VarintBytes(60 << 3 | 4),
        "deep groups": data + _VarintBytes(60 << 3 | 3) * 60 + _VarintBytes(60 << 3 | 4) * 60,
        "name that is not UTF-8": data + field(2, b"\xff\xfe"),
        "cut": data[:-1],
        "zero at the end": data + b"\0",
        "empty": b"",
    }


@pytest.mark.parametrize("kind", sorted(encodings((BUNDLES / "tiny" / "text_encoder.onnx").read_bytes())))
def test_only_the_canonical_encoding_is_read(synthetic_bundle: Path, kind: str) -> None:
    path = synthetic_bundle / "text_encoder.onnx"
    data = encodings(path.read_bytes())[kind]
    assert data != path.read_bytes()
    path.write_bytes(data)
    reseal(synthetic_bundle)
    assert "text_encoder.onnx" in refused(synthetic_bundle)


@pytest.mark.parametrize("file", sorted(BUNDLES.glob("*/*.onnx")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_graphs_of_the_built_in_models_are_canonical(file: Path) -> None:
    parse_graph(file.read_bytes(), file.name)


def test_a_name_that_is_not_utf8_is_one_sentence(synthetic_bundle: Path) -> None:
    path = synthetic_bundle / "text_encoder.onnx"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"text_encoder", b"text_enc\xffder"))
    reseal(synthetic_bundle)
    assert "text_encoder.onnx" in refused(synthetic_bundle)


def test_a_graph_of_very_many_empty_weights_is_refused_by_their_number(synthetic_bundle: Path) -> None:
    def add(model: onnx.ModelProto) -> None:
        model.graph.initializer.extend([TensorProto()] * (MAX_WEIGHTS + 1))

    edit_graph(synthetic_bundle, add)
    assert f"more than {MAX_WEIGHTS}" in refused(synthetic_bundle)
    assert MAX_GRAPH_BYTES <= 16 << 20  # 8 million of them at most, which are parsed in seconds and counted, not walked


def test_what_a_constant_expands_to_is_counted(synthetic_bundle: Path) -> None:
    """12 kB that become 16 GB before the first run, by operators that real graphs have."""
    from tmd_engines.cost.sizing import estimate

    def expand(model: onnx.ModelProto) -> None:
        shape = numpy_helper.from_array(np.array([1, 1 << 18, 1 << 14], np.int64), "expand.shape")
        zero = numpy_helper.from_array(np.zeros(1, np.float32), "expand.zero")
        model.graph.initializer.extend([shape, zero])
        huge = helper.make_node("Expand", ["expand.zero", "expand.shape"], ["huge"], name="huge")
        mean = helper.make_node("ReduceMean", ["huge"], ["mean"], name="mean", keepdims=0)
        add = helper.make_node("Add", [model.graph.node[-1].output[0], "mean"], ["prompt_embeds"], name="last")
        model.graph.node[-1].output[0] = add.input[0] = "before"
        model.graph.node.extend([huge, mean, add])

    sizes = {"width": 64, "height": 64, "frames": 17}
    before = estimate(Bundle.open(synthetic_bundle), **sizes).peak("low")  # type: ignore[arg-type]
    edit_graph(synthetic_bundle, expand, "text_encoder")
    after = estimate(Bundle.open(synthetic_bundle), **sizes).peak("low")  # type: ignore[arg-type]
    assert after - before > 16 << 30
