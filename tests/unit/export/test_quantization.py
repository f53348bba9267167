"""int8 and fp8 graphs: rounding as others do it, the pattern that engines fuse, calibration, and what stays high."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import tmd_ref.wan
from tests.helpers.export_tools import WAN, small_export, small_graph, small_source, with_weights
from tests.helpers.quantized_tools import export_small, quantized
from tmd_export import ExportError
from tmd_export.families.build import build
from tmd_export.families.tmd import TMD
from tmd_export.graphs import rules as lint
from tmd_export.quantization import nvfp4, qdq
from tmd_export.quantization.calibration import FILE, read_calibration
from tmd_export.quantization.formats import FP8, INT8
from tmd_export.quantization.observe import Observed
from tmd_export.quantization.prompts import default_prompts, read_prompts
from tmd_export.quantization.qdq import quantize
from tmd_export.quantization.rounded import Rounded
from tmd_export.quantization.scaled import SCALES, VALUES
from tmd_export.quantization.weights import QuantizedWeights

SIZES = {"batch": 2, "frames": 2, "height": 4, "width": 6, "text": 8}
FORMATS = {"int8": INT8, "fp8": FP8}
LINEARS, ATTENTIONS, FUSION = 10, 2, 2  # of a block, of a block, of the flow head


# Numbers.


def test_fp8_rounds_as_ml_dtypes_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)  # ties of E4M3 among them
    values = every[np.isfinite(every)]
    found = FORMATS["fp8"].round(torch.from_numpy(values)).float().numpy()
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(found, expected) and np.abs(found).max() == 448


def test_int8_rounds_to_nearest_even_and_saturates() -> None:
    values = np.arange(-2000, 2001, dtype=np.float32) / 8
    found = FORMATS["int8"].round(torch.from_numpy(values))
    assert found.dtype == torch.int8
    assert np.array_equal(found.numpy(), np.clip(np.rint(values), -127, 127))


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_are_the_nearest_values_with_a_scale_per_channel(precision: str) -> None:
    source, name = small_source(), "blocks.0.ffn.0.weight.T"
    exact = source.tensor("student", "backbone.blocks.0.ffn.0.weight").double().numpy().T  # [K, N]
    stored = QuantizedWeights(build(source, "backbone", precision)[1], {name: FORMATS[precision]})
    values, scales = (torch.cat(list(stored.chunks(name + kind))) for kind in (VALUES, SCALES))
    assert stored.form(name + VALUES) == (values.shape, FORMATS[precision].dtype)
    assert stored.form(name + SCALES) == (scales.shape, torch.bfloat16) == ((exact.shape[1],), torch.bfloat16)
    wide = scales.double().numpy()
    assert np.allclose(wide, np.abs(exact).max(0) / FORMATS[precision].largest, rtol=2**-8)
    grid = (
        np.arange(-127.0, 128.0)
        if precision == "int8"
        else np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    )
    grid = grid[np.isfinite(grid)]
    nearest = np.abs((exact / wide)[..., None] - grid).min(-1)
    assert np.allclose(np.abs(exact / wide - values.double().numpy()), nearest, atol=1e-5)


# Graphs.


def operators(part: str) -> list[onnx.NodeProto]:
    return list(onnx.load(quantized().bundle.graph_path(part), load_external_data=False).graph.node)


@pytest.mark.long
def test_every_large_product_is_quantized_and_nothing_else() -> None:
    for part, linears, attentions in (("backbone", LINEARS, ATTENTIONS), ("flow_head", LINEARS + FUSION, 0)):
        nodes = operators(part)
        makers = {name: node for node in nodes for name in node.output}
        products = [node for node in nodes if node.op_type == "MatMul"]
        narrow = [
            node
            for node in products
            if all(makers[name].op_type == "DequantizeLinear" for name in node.input if name in makers)
            and any(name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input)
        ]
        assert len(narrow) == linears + 2 * attentions
        assert sum(node.op_type == "Attention" for node in nodes) == (0 if attentions else ATTENTIONS)
        assert sum(node.op_type == "Softmax" for node in nodes) == attentions
        kept = {name for node in products if node not in narrow for name in node.input}
        assert {"patch_embedding.weight.flat.T", "head.patch_embedding.weight.flat.T"} & kept


def test_the_manifest_tells_precision_accuracy_and_files() -> None:
    manifest = quantized().bundle.manifest
    for part, precision in (("backbone", "fp8"), ("flow_head", "int8")):
        found = manifest.graphs[part]
        assert found.precision == precision and found.accuracy is not None
        assert 0.99 < found.accuracy.cosine < 0.99999
        assert "relative L2 by number of steps: 1: 0.0" in found.accuracy.reference
    assert FILE in manifest.files
    float32 = small_export().bundle.manifest.files["backbone.onnx.data"].size
    assert manifest.files["backbone.onnx.data"].size < 0.6 * float32  # what is small dominates at this size


def _drop_zero_point(node: onnx.NodeProto, _: onnx.ModelProto) -> None:
    del node.input[2:]


def _scale_per_channel(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("scales", TensorProto.BFLOAT16, [48], [1.0] * 48))
    node.input[1] = "scales"


def _wide_scale(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("wide", TensorProto.FLOAT, [], [1.0]))
    node.input[1] = "wide"


def _shifted(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("shifted", TensorProto.INT8, [], b"\x01", raw=True))
    node.input[2] = "shifted"


def _computed(node: onnx.NodeProto, model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Relu", [node.input[1]], ["computed"]))
    node.input[1] = "computed"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop_zero_point, "no zero point"),
        (_scale_per_channel, "48. scales for an activation"),
        (_wide_scale, "another type"),
        (_shifted, "not zero"),
        (_computed, "is computed"),
    ],
)
def test_a_pattern_that_engines_misread_is_refused(damage: Callable[..., None], said: str, tmp_path: Path) -> None:
    bundle = quantized().bundle
    model = onnx.load(bundle.graph_path("flow_head"), load_external_data=False)
    damage(next(node for node in model.graph.node if node.op_type == "QuantizeLinear"), model)
    (tmp_path / "flow_head.onnx").write_bytes(model.SerializeToString())
    info = bundle.graph_info("flow_head")
    with pytest.raises(ExportError, match=said):
        lint.lint(tmp_path / "flow_head.onnx", info.inputs, info.outputs)


def test_a_weight_that_is_transposed_behind_its_dequantize_is_refused(tmp_path: Path) -> None:
    bundle = quantized().bundle
    model = onnx.load(bundle.graph_path("backbone"), load_external_data=False)
    weight = next(node for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) == 2)
    product = next(node for node in model.graph.node if weight.output[0] in node.input)
    turn = helper.make_node("Transpose", [weight.output[0]], ["turned"], name="turn")
    product.input[1] = "turned"
    model.graph.node.insert(list(model.graph.node).index(weight) + 1, turn)
    (tmp_path / "backbone.onnx").write_bytes(model.SerializeToString())
    info = bundle.graph_info("backbone")
    with pytest.raises(ExportError, match="goes into Transpose, not into a product"):
        lint.lint(tmp_path / "backbone.onnx", info.inputs, info.outputs)


# Against torch: the same roundings, written with its own types.


def in_torch(precision: str, ranges: Mapping[str, float], module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds inputs and weights of the linear layers of `module`, and but for int8 all factors of its attention."""
    format = FORMATS["fp8" if precision == "nvfp4" else precision]

    def four_bits(x: Tensor, largest: float) -> Tensor:
        scale = nvfp4.tensor_scale(largest)
        return torch.from_numpy(nvfp4.dequantize(*nvfp4.quantize(x.numpy(), scale), scale))

    def rounded(x: Tensor, scale: Tensor | float) -> Tensor:
        if precision == "int8":
            return torch.fake_quantize_per_tensor_affine(x, scale, 0, -128, 127)  # type: ignore[arg-type]
        return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name in ranges and precision == "nvfp4":
            layer.weight.data = four_bits(layer.weight.data, float(layer.weight.data.abs().max()))
            most = 4 * ranges[name]
            layer.register_forward_pre_hook(lambda _, given, most=most: (four_bits(given[0], most),))
        elif isinstance(layer, nn.Linear) and name in ranges:
            scale = layer.weight.detach().abs().amax(1, keepdim=True) / format.largest
            layer.weight.data = (
                rounded(layer.weight.data, scale)
                if precision == "fp8"
                else torch.round(layer.weight.data / scale).clamp(-127, 127) * scale
            )
            room = format.headroom * ranges[name] / format.largest
            layer.register_forward_pre_hook(lambda _, given, room=room: (rounded(given[0], room),))
    if precision == "int8":
        return
    order = iter(name for name, found in module.named_modules() if isinstance(found, tmd_ref.wan.Attention))

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        name = f"{next(order)}.attention"
        factor = (q.shape[-1] // heads) ** -0.5
        q, k, v = (
            rounded(x * by, by * 4 * ranges[f"{name}.{part}"] / 448).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, part, by in ((q, "q", factor), (k, "k", 1.0), (v, "v", 1.0))
        )
        shares = rounded((q @ k.transpose(-1, -2)).softmax(-1), 1 / 448)
        return (shares @ v).transpose(1, 2).flatten(2)

    monkeypatch.setattr(tmd_ref.wan, "attention", attention)


@pytest.mark.parametrize("precision", ["int8", "fp8", "nvfp4"])
def test_a_graph_with_all_layers_rounded_is_what_torch_computes(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = with_weights(small_source(), "backbone")
    inputs = graph.random_inputs(3, **SIZES)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    path = small_export().bundle.graph_path("backbone")
    observed = Observed(small_export().bundle, "backbone", TMD.products)
    exact = observed(arrays)["features"]
    with (
        closing(Rounded(path, precision, observed.ranges, TMD.products)) as rounded,
        closing(Rounded(path, "fp8", observed.ranges, TMD.products)) as fp8,
    ):
        kept = rounded(arrays, rounded.layers)["features"]
        if precision == "nvfp4":  # what is not in it is in fp8
            assert np.abs(kept - fp8(arrays)["features"]).max() < 1e-5
            assert set(rounded.layers) == {name for name in fp8.layers if not name.endswith(".attention")}
        else:
            assert np.abs(kept - exact).max() < 1e-5
        found = rounded(arrays)["features"]
    in_torch(precision, observed.ranges, graph.module, monkeypatch)
    with torch.no_grad():
        expected = graph.module(*inputs.values())[0].numpy()
    difference, rounding = (float(np.linalg.norm(found - other)) for other in (expected, exact))
    assert rounding / np.linalg.norm(exact) > 0.003
    assert difference < 0.1 * rounding  # a value between two steps can go the other way


def test_heads_filled_up_with_zeros_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = with_weights(small_source(), "backbone")
    inputs = {name: value.numpy() for name, value in graph.random_inputs(3, **SIZES).items()}
    path = small_export().bundle.graph_path("backbone")
    observed = Observed(small_export().bundle, "backbone", TMD.products)
    observed(inputs)
    results = []
    for unit in (16, 24):  # heads of this model have 16 values
        monkeypatch.setattr(qdq, "_HEAD_UNIT", unit)
        with closing(Rounded(path, "fp8", observed.ranges, TMD.products)) as rounded:
            results.append(rounded(inputs)["features"])
    assert WAN.head_dim == 16 and np.abs(results[0] - results[1]).max() < 1e-6


def test_ranges_are_those_of_the_layers_inputs() -> None:
    graph = with_weights(small_source(), "flow_head")
    inputs = graph.random_inputs(3, **SIZES)
    largest: dict[str, float] = {}
    for name, layer in graph.module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(
                lambda _, given, name=name: largest.__setitem__(name, float(given[0].abs().max()))
            )
    with torch.no_grad():
        graph.module(*inputs.values())
    observed = Observed(small_export().bundle, "flow_head", TMD.products)
    observed({name: value.numpy() for name, value in inputs.items()})
    found = {name: value for name, value in observed.ranges.items() if ".attention." not in name}
    assert len(found) == LINEARS + FUSION
    assert found == pytest.approx({name: largest[name] for name in found}, rel=1e-4)


# Calibrations as files.


def test_a_calibration_makes_the_same_graph_again(tmp_path: Path) -> None:
    first = quantized().bundle
    calibration = read_calibration(first.folder / FILE)
    again = export_small(
        tmp_path / "bundle", parts=("backbone",), precision="fp8", calibration=calibration, verify=False
    ).bundle
    for name in ("backbone.onnx", "backbone.onnx.data", FILE):
        assert again.manifest.files[name] == first.manifest.files[name]
    table = calibration.sensitivity["fp8"]["backbone"]
    assert len(table.layers) == LINEARS + ATTENTIONS and 0 < max(table.layers.values()) < table.everything < 0.1


def test_a_calibration_of_other_weights_is_refused(tmp_path: Path) -> None:
    calibration = read_calibration(quantized().bundle.folder / FILE)
    with pytest.raises(ExportError, match=r"another checkpoint \(origin random weigh"):
        export_small(tmp_path / "bundle", seed=1, precision="int8", calibration=calibration)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda document: document.update(format="tmd-calibration-9"), "its format is tmd-calibration-9"),
        (lambda document: document["ranges"]["backbone"].update(x=-1.0), r"ranges\.backbone\.x"),
        (lambda document: document.update(more=1), "more"),
        (lambda document: document.pop("checkpoint"), "checkpoint"),
    ],
)
def test_a_damaged_calibration_is_refused(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    document = json.loads((quantized().bundle.folder / FILE).read_text())
    change(document)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ExportError, match=f"no calibration of this version of tmd-export: {said}"):
        read_calibration(path)


def test_a_calibration_of_an_earlier_version_is_refused_with_what_makes_a_new_one(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text('{"format": "tmd-calibration-1"}')
    with pytest.raises(ExportError, match=r"tmd-calibration-1.*tmd-calibration-2.*without --calibration"):
        read_calibration(path)


def test_a_missing_range_names_the_layer() -> None:
    ranges = dict(read_calibration(quantized().bundle.folder / FILE).ranges["backbone"])
    del ranges["blocks.0.ffn.2"]
    graph, weights = build(small_source(), "backbone", "fp8")
    with pytest.raises(ExportError, match=r"no range for blocks\.0\.ffn\.2"):
        quantize(small_graph(graph), weights, "fp8", ranges, TMD.products)


def test_prompts_are_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n a red circle \n\na blue star\n", encoding="utf-8")
    assert read_prompts(path) == ("a red circle", "a blue star")
    for content, said in ((b"\n \n", "has 0 prompts"), (b"\xff\xfe", "not UTF-8"), (b"x\n" * 257, "has 257 prompts")):
        path.write_bytes(content)
        with pytest.raises(ExportError, match=said):
            read_prompts(path)
    with pytest.raises(ExportError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize("built_in", [True, False])
def test_results_are_compared_on_prompts_that_were_not_calibrated_on(built_in: bool) -> None:
    assert not set(default_prompts(built_in)) & set(default_prompts(built_in, held_out=True))
