"""NVFP4 graphs: the form that engines recognise and no other, what TensorRT gets of it, and who refuses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.lowering_models import BROKEN_FLOAT4
from tests.helpers.synthetic_quantized import QUANTIZED, quantized_models, write_quantized_bundle
from tmd_engines import Bundle, BundleError, EngineError, load
from tmd_engines.bundle.float4 import find_blocks, makes_float4
from tmd_engines.onnxruntime.engine import OnnxRuntimeEngine
from tmd_engines.onnxruntime.float4 import float4_to_float8
from tmd_engines.tensorrt.float4 import check_version, use_dynamic_quantize
from tmd_engines.tensorrt.targets import lacking, needed

DIMS = {"batch": 1, "frames": 2, "height": 4, "width": 6, "text": 32, "tokens": 12}
Damage = Callable[[onnx.ModelProto], None]


def four_bits() -> onnx.ModelProto:
    return quantized_models("nvfp4")["backbone"]


def first(model: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    """The first node of a kind on the way to the scales of the first activation in blocks."""
    makers = {name: node for node in model.graph.node for name in node.output}
    node = next(filter(makes_float4, model.graph.node))
    node = makers[node.input[1]]
    while node.op_type != kind:
        node = makers[node.input[1 if kind in ("Concat", "Shape") and node.op_type == "Reshape" else 0]]
    return node


def attribute(kind: str, name: str, value: int) -> Damage:
    def damage(model: onnx.ModelProto) -> None:
        next(each for each in first(model, kind).attribute if each.name == name).i = value

    return damage


def constant(kind: str, values: object, dtype: type) -> Damage:
    def damage(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, dtype), "other"))
        first(model, kind).input[1] = "other"

    return damage


def of_another_tensor(model: onnx.ModelProto) -> None:
    first(model, "Abs").input[0] = first(model, "Abs").input[0] + ".other"


def another_operator(model: onnx.ModelProto) -> None:
    first(model, "ReduceMax").op_type = "ReduceMean"


DAMAGES = {
    "another largest value": constant("Div", 7.0, np.float32),
    "a largest value for each": constant("Div", [6.0], np.float32),
    "another axis": constant("ReduceMax", [-2], np.int64),
    "blocks of 32": constant("Concat", [-1, 32], np.int64),
    "another scalar": constant("QuantizeLinear", 1.0, np.float32),
    "kept dimensions": attribute("ReduceMax", "keepdims", 1),
    "another shape": attribute("Shape", "end", -2),
    "scales of another type": attribute("QuantizeLinear", "output_dtype", TensorProto.FLOAT8E5M2),
    "another tensor": of_another_tensor,
    "means": another_operator,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_scales_found_in_another_way_are_not_taken_for_tensorrts(damage: Damage) -> None:
    model = four_bits()
    before = len(find_blocks(model))
    damage(model)
    assert len(find_blocks(model)) == before - 1
    with pytest.raises(EngineError, match="quantizes to float4 in a form that TensorRT has no operator for"):
        use_dynamic_quantize(model, "it.onnx")


def test_tensorrt_gets_one_operator_and_the_rest_as_it_was() -> None:
    model = four_bits()
    before, blocks = Counter(node.op_type for node in model.graph.node), find_blocks(model)
    assert use_dynamic_quantize(model, "it.onnx") == len(blocks) == 5
    after = Counter(node.op_type for node in model.graph.node)
    gone = before - after  # Shape: one that nobody reads was there too
    assert {kind for kind, count in gone.items() if count == 5} | {"Shape"} == {
        "Abs", "Shape", "Concat", "Reshape", "ReduceMax", "Cast", "Div", "Clip"
    }  # fmt: skip
    assert gone["QuantizeLinear"] == 10 and len(gone) == 9
    assert after - before == Counter({"TRT_FP4DynamicQuantize": 5})
    made = [node for node in model.graph.node if node.domain == "trt"]
    for node, each in zip(made, blocks, strict=True):
        assert list(node.input) == [each.x, each.scale]
        assert list(node.output) == [each.values.output[0], each.scales.output[0]]
        assert {part.name: part.i for part in node.attribute} == {"axis": -1, "block_size": 16, "scale_type": 17}
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    for node in model.graph.node:  # in an order in which it can run
        assert known.issuperset(filter(None, node.input))
        known.update(node.output)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, "trt": 1}


def test_an_older_tensorrt_and_a_graph_without_float4() -> None:
    for version in ((10, 3), (10, 15)):
        with pytest.raises(EngineError, match=r"is nvfp4, which takes TensorRT 11 .* this is TensorRT 10\.\d+"):
            check_version(four_bits(), version, "it.onnx")
    check_version(four_bits(), (11, 0), "it.onnx")
    fp8 = quantized_models("fp8")["backbone"]
    untouched = fp8.SerializeToString()
    check_version(fp8, (10, 3), "it.onnx")
    assert use_dynamic_quantize(fp8, "it.onnx") == float4_to_float8(fp8) == 0
    assert fp8.SerializeToString() == untouched


@pytest.mark.parametrize("model", BROKEN_FLOAT4.values(), ids=BROKEN_FLOAT4)
def test_float4_in_another_form_is_refused_on_a_cpu(model: onnx.ModelProto) -> None:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    with pytest.raises(BundleError, match=r"it\.onnx: node QuantizeLinear 'it' quantizes to float4 in another form"):
        float4_to_float8(copy, "it.onnx")


def test_onnx_runtime_computes_what_the_graph_says_and_openvino_refuses(tmp_path: Path) -> None:
    bundle = Bundle.open(write_quantized_bundle(tmp_path / "bundle", dict.fromkeys(QUANTIZED, "nvfp4")))
    found = []
    for as_stored in (False, True):
        with OnnxRuntimeEngine(bundle, "backbone", "cpu", 1, as_stored=as_stored) as engine:
            rng = np.random.default_rng(0)
            inputs = {name: engine.empty(name, **DIMS) for name in engine.inputs}
            for array in inputs.values():
                array[...] = rng.standard_normal(array.shape)
            outputs = {name: engine.empty(name, **DIMS) for name in engine.outputs}
            engine.run(inputs, outputs)
            found.append(outputs["features"])
    error = np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[1])
    assert 0 < error < 0.1  # rounded to bfloat16 between products, values of 4 bits fall to the other side
    with pytest.raises(EngineError, match="is nvfp4, and the engine openvino computes"):
        load(bundle, "backbone", "openvino", "cpu")


def test_what_cards_lack_is_told_with_what_to_export_instead() -> None:
    assert needed("bf16") is needed("fp16") is needed("fp32") is None
    assert needed("nvfp4") == ("RTX cards from compute capability 12.0 on; for others export fp8 (from 8.9 on) or bf16")
    assert "from compute capability 8.9 on; for others export fp16 or bf16" in (needed("fp8") or "")
    assert lacking("12.0") is lacking("12.1") is lacking("7.5") is None
    assert lacking("8.9") == "does not compute nvfp4 (from 12.0 on): export fp8 or bf16 for it"
    assert lacking("8.6") == "does not compute fp8 (from 8.9 on) and nvfp4 (from 12.0 on): export bf16 for it"


def test_half_bytes_are_counted() -> None:
    from tmd_engines.cost.shapes import Tensor

    assert Tensor(TensorProto.FLOAT4E2M1, (16, 3)).nbytes == 24
    assert Tensor(TensorProto.FLOAT8E4M3FN, (16, 3)).nbytes == 48
    assert helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT4E2M1).itemsize == 1  # numpy's is a byte
