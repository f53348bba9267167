"""What a run needs, told beforehand: operations by the formulas of the parts, memory by who is alive when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.built_in import BUILT_IN
from tests.helpers.bundle_tools import edit_graph, impossible_transpose
from tests.helpers.synthetic_quantized import write_quantized_bundle
from tests.helpers.synthetic_tim import write_tim_bundle
from tests.helpers.system_files import FREE_MEMORY
from tmd_engines import Bundle, BundleError
from tmd_engines.command.device_memory import device_memory, predicted
from tmd_engines.cost.fused import MARGIN, WORKSPACE, scratch_bytes
from tmd_engines.cost.operations import flops, peak_activation_bytes, weight_bytes
from tmd_engines.cost.shapes import ShapedGraph, infer_shapes
from tmd_engines.cost.sizing import BASE_BYTES, TOGETHER, StageEstimate, estimate
from tmd_engines.cost.system_memory import available_bytes
from tmd_engines.holding import ONNXRUNTIME, OPENVINO
from tmd_engines.registry import choose

MEGABYTE = 1 << 20


def shaped(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[int]], weights: dict[str, Any], kind: int = TensorProto.FLOAT
) -> ShapedGraph:
    """The graph of `nodes` whose inputs are of `kind`, with weights given as (shape, type) or as an array."""
    initializers = [
        numpy_helper.from_array(value, name)
        if hasattr(value, "dtype")
        else onnx.TensorProto(name=name, dims=value[0], data_type=value[1])  # no values: nobody may ask for them
        for name, value in weights.items()
    ]
    values = [helper.make_tensor_value_info(name, kind, ["n"] * len(shape)) for name, shape in inputs.items()]
    last = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in nodes[-1].output]
    graph = helper.make_graph(nodes, "g", values, last, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    return infer_shapes(model, {name: tuple(shape) for name, shape in inputs.items()}, "g.onnx")


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


F32, F16, BF16, INT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8


@pytest.mark.parametrize(
    ("made", "inputs", "weight", "expected"),
    [
        (node("MatMul", "x w", "y"), [2, 5, 7], [7, 3], 2 * (2 * 5 * 3) * 7),
        (node("Gemm", "x w", "y", transA=1), [7, 5], [7, 3], 2 * (5 * 3) * 7),
        (node("Gemm", "x w", "y", transB=1), [5, 7], [3, 7], 2 * (5 * 3) * 7),
        (node("Conv", "x w", "y", strides=[1, 2, 2]), [1, 6, 4, 8, 8], [10, 6, 3, 2, 2], 2 * (10 * 2 * 4 * 4) * 6 * 12),
        (node("Conv", "x w", "y", group=3), [1, 6, 8, 8], [12, 2, 3, 3], 2 * (12 * 6 * 6) * 2 * 9),
        (node("ConvTranspose", "x w", "y", strides=[2, 2]), [1, 6, 4, 4], [6, 5, 2, 2], 2 * (6 * 4 * 4) * 5 * 4),
        (node("Relu", "x", "y"), [4, 4], [1], 0),
    ],
)
def test_operations_of_a_product_are_two_per_multiply_add(made, inputs, weight, expected):
    assert flops(shaped([made], {"x": inputs}, {"w": (weight, F32)}), "g.onnx") == expected


@pytest.mark.parametrize(
    ("query", "key", "value", "heads"),
    [
        ([2, 9, 24], [2, 5, 24], [2, 5, 30], {"q_num_heads": 3, "kv_num_heads": 3}),
        ([2, 3, 9, 8], [2, 3, 5, 8], [2, 3, 5, 10], {}),
    ],
)
def test_attention_counts_scores_and_values(query, key, value, heads):
    graph = shaped([node("Attention", "q k v", "y", **heads)], {"q": query, "k": key, "v": value}, {})
    assert flops(graph, "g.onnx") == 2 * (2 * 9 * 5) * (24 + 30)


def test_shapes_pass_through_arithmetic_on_shapes():
    """height // 2 x width // 2 tokens, as exporters write it; onnx alone loses the sizes at the division."""
    import numpy as np

    nodes = [
        node("Shape", "x", "shape"),
        node("Slice", "shape from to", "sides"),
        node("Div", "sides two", "half"),
        node("Concat", "half rest", "target", axis=0),
        node("Reshape", "x target", "patches"),
        node("MatMul", "patches w", "y"),
    ]
    constants = {"from": [1], "to": [3], "two": [2, 2], "rest": [-1]}
    weights = {name: np.asarray(value, np.int64) for name, value in constants.items()} | {"w": ([20, 7], F32)}
    graph = shaped(nodes, {"x": [1, 6, 8, 5]}, weights)
    assert graph.tensors["y"].shape == (3, 4, 7)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (node("Einsum", "x x", "y", equation="ij,kj->ik"), "no rule for the operations of Einsum"),
        (node("NonZero", "x", "y"), "NonZero .* does not follow from the inputs"),
        (node("Strange", "x", "y", domain="made.up"), "made.up.Strange"),
        (node("MatMul", "x x", "y"), "MatMul"),
        (node("Relu", "z", "y"), "comes from nowhere"),
    ],
)
def test_what_cannot_be_counted_is_an_error_and_not_a_zero(made, message):
    with pytest.raises(BundleError, match=message):
        flops(shaped([made], {"x": [3, 4]}, {}), "g.onnx")


@pytest.mark.parametrize(
    ("nodes", "tensors"),
    [
        # x -> a -> b -> y with nothing kept: two neighbours at a time; a is freed before y
        ([node("Softmax", "x", "a"), node("Softmax", "a", "b"), node("Softmax", "b", "c"), node("Pow", "c x", "y")], 2),
        # a is read once more at the end
        ([node("Softmax", "x", "a"), node("Softmax", "a", "b"), node("Softmax", "b", "c"), node("Pow", "c a", "y")], 3),
        # views take nothing, and keep what they look at
        ([node("Softmax", "x", "a"), node("Identity", "a", "b"), node("Softmax", "b", "y")], 1),
        (
            [node("Softmax", "x", "a"), node("Identity", "a", "b"), node("Softmax", "x", "c"), node("Pow", "b c", "y")],
            2,
        ),
        # what follows from weights alone is computed once, and stays; in the place of a weight it is that weight
        ([node("Softmax", "w", "a"), node("Softmax", "a", "b"), node("Pow", "x b", "y")], 2),
        ([node("Transpose", "w", "a"), node("Pow", "x a", "y")], 0),
        # tanh-Gelu has a copy of its own, attention one of each input
        ([node("Gelu", "x", "a", approximate="tanh"), node("Softmax", "a", "y")], 2),
        ([node("Attention", "x x x", "a", q_num_heads=1, kv_num_heads=1), node("Softmax", "a", "y")], 4),
    ],
)
def test_activations_live_until_their_last_reader(nodes, tensors):
    graph = shaped(nodes, {"x": [1, 1, MEGABYTE]}, {"w": ([1, 1, MEGABYTE], F32)})
    assert peak_activation_bytes(graph) == int(ONNXRUNTIME.arena * tensors * 4 * MEGABYTE)


@pytest.mark.parametrize(
    ("holding", "kind", "of_weight", "of_value"),
    [(ONNXRUNTIME, F16, 4, 4), (ONNXRUNTIME, BF16, 4, 4), (OPENVINO, F16, 8, 4), (OPENVINO, BF16, 2, 2)],
)
def test_values_in_low_precision_are_held_as_the_engine_holds_them(holding, kind, of_weight, of_value):
    nodes = [
        node("Cast", "x", "low", to=kind),
        node("MatMul", "low w", "a"),
        node("Softmax", "a", "b"),
        node("Pow", "b b", "y"),
    ]
    graph = shaped(nodes, {"x": [1, 64]}, {"w": ([64, 1000], kind)})
    assert weight_bytes(graph, holding) == of_weight * 64_000
    copied = 4 * 64 if holding is OPENVINO else 0
    assert peak_activation_bytes(graph, holding) == int(holding.arena * of_value * 2000) + copied


@pytest.mark.parametrize(
    ("nodes", "widened", "between"),
    [
        # the widened copy of x is there from its first reader to its last
        ([node("Softmax", "x", "a"), node("Softmax", "a", "b"), node("Pow", "b x", "y")], 12, 8),
        ([node("Softmax", "x", "a"), node("Softmax", "a", "b"), node("Cast", "b", "y", to=F32)], 8, 8),
        # y is computed wide before it is converted, but by a Cast
        ([node("Softmax", "x", "a"), node("Softmax", "a", "b"), node("Pow", "b b", "y")], 8, 8),
        ([node("Softmax", "x", "a"), node("Cast", "a", "y", to=F16)], 8, 4),
        ([node("Cast", "x", "a", to=F32), node("Softmax", "a", "b"), node("Cast", "b", "y", to=F16)], 8, 8),
    ],
)
def test_what_comes_in_and_goes_out_in_16_bits_is_copied_where_the_engine_widens(nodes, widened, between):
    """Bytes per element; OpenVINO has a copy of all inputs as they are, and float32 between the ends."""
    graph = shaped(nodes, {"x": [1, 1, MEGABYTE]}, {}, F16)
    assert peak_activation_bytes(graph) == int(ONNXRUNTIME.arena * widened * MEGABYTE)
    assert peak_activation_bytes(graph, OPENVINO) == int(OPENVINO.arena * between * MEGABYTE) + 2 * MEGABYTE


def test_an_estimate_is_that_of_the_engine_that_is_asked_for(synthetic_bundle):
    pytest.importorskip("openvino")
    write_quantized_bundle(folder := synthetic_bundle.with_name("low"), {"backbone": "int8", "flow_head": "int8"})
    bundle = Bundle.open(folder)
    size: dict[str, Any] = {"width": 64, "height": 64, "frames": 5}
    plain, openvino = (estimate(bundle, engine=engine, **size) for engine in ("onnxruntime", "openvino"))
    assert openvino.stages["backbone"].weight_bytes < plain.stages["backbone"].weight_bytes
    assert openvino.peak("low") == BASE_BYTES + OPENVINO.program + max(
        sum(openvino.stages[name].total_bytes for name in stages if name in openvino.stages) for stages in TOGETHER
    )
    chosen = estimate(bundle, engine="auto", device="cpu", **size)
    engine, _ = choose(bundle, "backbone", "auto", "cpu")
    assert chosen.stages["backbone"] == {"openvino": openvino, "onnxruntime": plain}[engine].stages["backbone"]


@pytest.mark.parametrize(("reader", "itemsize"), [("MatMul", 2), ("Add", 4)])
def test_large_weights_of_products_stay_in_16_bits_and_one_at_a_time_is_widened(reader, itemsize):
    nodes = [node("Cast", "x", "low", to=F16), node(reader, "low w", "y")]
    graph = shaped(nodes, {"x": [1024, 1024]}, {"w": ([1024, 1024], F16)})
    assert weight_bytes(graph) == itemsize * MEGABYTE
    widened = 4 * MEGABYTE if reader == "MatMul" else 0
    assert peak_activation_bytes(graph) == int(ONNXRUNTIME.arena * (2 * 4 * MEGABYTE + widened))


def test_weights_in_low_precision_are_held_in_float32_and_tables_stay_in_their_file():
    nodes = [
        node("Cast", "ids", "rows", to=TensorProto.INT64),
        node("Gather", "table rows", "a"),
        node("Cast", "half", "w", to=F32),
        node("MatMul", "a w", "y"),
    ]
    weights = {"table": ([1000, 8], F32), "half": ([8, 4], F16), "quantized": ([8, 4], INT8)}
    assert weight_bytes(shaped(nodes, {"ids": [3]}, weights)) == 4 * 32 + 32


def test_a_run_of_the_built_in_model():
    """Calls, NFE, and the two memory modes as sums over the stages."""
    bundle = Bundle.open(BUILT_IN)
    found = estimate(bundle, width=64, height=64, frames=17, steps=2, inner_steps=4)
    stages = found.stages
    assert {name: stage.calls for name, stage in stages.items()} == {
        "text_encoder": 1,
        "backbone": 2,
        "flow_head": 8,
        "update": 2,
        "decoder": 1,
    }
    assert found.nfe == 2 * (1 + 3 * 2 / 8)
    assert found.flops == sum(stage.flops * stage.calls for stage in stages.values())
    sizes = {name: stage.weight_bytes + stage.activation_bytes + stage.io_bytes for name, stage in stages.items()}
    assert found.peak_bytes == BASE_BYTES + sum(sizes.values())
    low = max(sizes["text_encoder"], sizes["backbone"] + sizes["flow_head"], sizes["decoder"])
    assert estimate(bundle, width=64, height=64, frames=17, memory="low").peak_bytes == BASE_BYTES + low
    # text encoder: 32 ids, 32 of the mask, 32 x 64 values; flow head: noise, y in and out, s, r: the rest is shared
    assert stages["text_encoder"].io_bytes == 32 * 8 * 2 + 32 * 64 * 4
    assert stages["flow_head"].io_bytes == 3 * (16 * 5 * 8 * 8 * 4) + 2 * 4


@pytest.mark.parametrize("damage", ["stage", "count", "kind", "all"])
def test_what_was_counted_before_is_taken_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("TMD_CACHE", str(tmp_path))
    bundle = Bundle.open(BUILT_IN)
    expected = estimate(bundle, width=64, height=64, frames=5)
    (counts,) = (document := json.loads((tmp_path / "sizes.json").read_text())).values()
    match damage:
        case "stage":
            del counts["decoder"]
        case "count":
            counts["decoder"].pop()
        case "kind":
            counts["decoder"][0] = "many"
    (tmp_path / "sizes.json").write_text("[" if damage == "all" else json.dumps(document))
    assert estimate(bundle, width=64, height=64, frames=5) == expected
    with monkeypatch.context() as patch:
        patch.setattr("tmd_engines.cost.sizing._stage", None)
        assert estimate(bundle, width=64, height=64, frames=5) == expected, "and then nothing is counted again"


def test_decoder_buffers_are_two_sets_of_caches_and_the_clip_twice(synthetic_bundle: Path):
    found = estimate(Bundle.open(synthetic_bundle), width=64, height=96, frames=17).stages["decoder"]
    latents, caches, pixels = 16 * 8 * 12 * 4, 32 * 8 * 12 * 4, 64 * 96 * 3
    assert found.io_bytes == latents + 4 + 2 * caches + (1 + 4) * pixels + 2 * 17 * pixels
    still = estimate(Bundle.open(synthetic_bundle), width=64, height=96, frames=1).stages["decoder"]
    assert still.io_bytes == latents + 4 + caches + (1 + 4) * pixels + 2 * pixels, "one set: nothing comes after it"


def test_stills_have_rows_for_guidance_and_tiles_for_the_autoencoder(tmp_path: Path) -> None:
    bundle = Bundle.open(write_tim_bundle(tmp_path / "tim", pictures=True))

    def stages(width: int, passes: int = 1) -> dict[str, StageEstimate]:
        asked: dict[str, Any] = {"width": width, "height": 1024, "frames": 1, "guidance_passes": passes}
        return estimate(bundle, **asked, from_picture=True).stages

    one, guided = stages(1024), stages(1024, passes=2)
    assert guided["flow_head"].calls == one["flow_head"].calls == 4
    assert 1.9 < guided["flow_head"].flops / one["flow_head"].flops < 2.1
    assert 1.9 < guided["flow_head"].activation_bytes / one["flow_head"].activation_bytes < 2.1
    assert guided["decoder"] == one["decoder"] and guided["text_encoder"].calls == 2
    large = stages(3072)  # four tiles of 1024, of which 256 overlap
    for stage in ("encoder", "decoder"):
        assert (one[stage].calls, large[stage].calls) == (1, 4)
        assert large[stage].flops == one[stage].flops and large[stage].activation_bytes == one[stage].activation_bytes
    assert large["decoder"].io_bytes - one["decoder"].io_bytes == 2 * 3 * 1024 * 2048  # the picture alone is larger
    assert large["flow_head"].activation_bytes > 2 * one["flow_head"].activation_bytes


def test_decoder_work_grows_by_the_frame_and_its_memory_by_the_clip_alone():
    bundle = Bundle.open(BUILT_IN)

    def decoder(frames: int) -> StageEstimate:
        return estimate(bundle, width=64, height=96, frames=frames).stages["decoder"]

    still, short, middle, long = (decoder(frames) for frames in (1, 17, 49, 81))
    assert long.flops - middle.flops == middle.flops - short.flops > still.flops
    assert long.activation_bytes == short.activation_bytes > still.activation_bytes
    assert long.io_bytes - short.io_bytes == 2 * 64 * 64 * 96 * 3


@pytest.mark.parametrize(
    "wish",
    [{"width": 72}, {"height": 0}, {"frames": 16}, {"frames": 0}, {"steps": 0}, {"inner_steps": 0}],
)
def test_what_the_model_cannot_make_is_a_value_error(wish):
    bundle = Bundle.open(BUILT_IN)
    with pytest.raises(ValueError, match=r"cannot be made|at least 1"):
        estimate(bundle, **{"width": 64, "height": 64, "frames": 17, **wish})


def test_a_model_of_stills_has_one_frame(tmp_path: Path):
    bundle = Bundle.open(write_tim_bundle(tmp_path / "stills"))
    with pytest.raises(ValueError, match="5 frames cannot be made: this is a model of stills"):
        estimate(bundle, width=64, height=64, frames=5)


def test_a_graph_of_the_bundle_that_cannot_be_counted_is_named(synthetic_bundle: Path):
    edit_graph(synthetic_bundle, impossible_transpose)
    with pytest.raises(BundleError, match=r"backbone.onnx cannot be sized: node Transpose"):
        estimate(Bundle.open(synthetic_bundle), width=64, height=64, frames=17)


@pytest.mark.parametrize(("files", "expected"), FREE_MEMORY)
def test_free_memory_is_the_least_that_machine_and_container_leave(tmp_path: Path, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert available_bytes(tmp_path) == expected


def test_scratch_of_a_transformer_is_what_lies_between_its_nodes_but_for_the_scores_of_attention() -> None:
    rows, width = 1000, 64
    nodes = [
        node("MatMul", "x w", "q"),
        node("Add", "q b", "biased"),  # two at once
        node("Transpose", "biased", "keys", perm=[1, 0]),
        node("MatMul", "biased keys", "scores"),
        node("Softmax", "scores", "weights", axis=-1),
        node("MatMul", "weights biased", "mixed"),
        node("MatMul", "mixed w", "out"),
    ]
    graph = shaped(nodes, {"x": [rows, width]}, {"w": ((width, width), F32), "b": ((width,), F32)})
    assert scratch_bytes(graph) == int(MARGIN * 2 * rows * width * 4) + WORKSPACE  # and not rows² of scores


def test_scratch_of_an_autoencoder_leaves_out_what_is_computed_inside_a_convolution() -> None:
    nodes = [
        node("Conv", "x w", "a", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", "a", "b"),
        node("Conv", "b w", "c", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", "c", "out"),
    ]
    graph = shaped(nodes, {"x": [1, 8, 32, 32]}, {"w": ((8, 8, 3, 3), F32)})
    assert scratch_bytes(graph) == int(MARGIN * 8 * 32 * 32 * 4) + WORKSPACE  # b alone


def test_memory_on_a_gpu_shares_scratch_and_takes_the_stages_in_turn() -> None:
    bundle = Bundle.open(BUILT_IN)
    figures = {graph: {"weights": 10, "scratch": size} for size, graph in enumerate(bundle.manifest.graphs, 100)}
    memory = device_memory(bundle, (64, 64, 17), figures)
    assert memory.every.weights == 10 * len(figures) and memory.every.scratch == 99 + len(figures)
    assert memory.low.weights == 20 and sum(memory.low) < sum(memory.every)
    # One frame needs no decoder_step.
    assert device_memory(bundle, (64, 64, 1), figures).stages["decoder"].weights == 10
    assert set(predicted(bundle, (64, 64, 17))) == set(figures)
