"""Weights on their way from a source into a data file: one at a time, each in its place, compared afterwards."""

from __future__ import annotations

import re
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from tests.helpers.export_tools import VAE, WAN, small_graph, small_source, with_weights
from tmd_engines import Bundle
from tmd_export import ExportError, RandomSource, graph_export
from tmd_export.families.build import build
from tmd_export.graph_export import export_graph
from tmd_export.graphs.accuracy import Accuracy, check
from tmd_export.graphs.trace import trace
from tmd_export.weights import storage
from tmd_export.weights.storage import compare, save
from tmd_ref.wan import WanConfig

EXACT = re.compile(
    r"norm|gamma|modulation|fusion\.gate|pos_embedding|(time|interval)_(emb|proj)|patch_embedding|head\.head|vae\.conv[12]"
    r"|(en|de)coder\.(conv1|head)"
)


class WatchedSource(RandomSource):
    """Counts the elements of the weights that are alive at once."""

    alive = most = 0

    def tensor(self, which: str, name: str) -> Tensor:
        tensor = super().tensor(which, name)
        size = tensor.numel()
        self.alive += size
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._gone, size)
        return tensor

    def _gone(self, size: int) -> None:
        self.alive -= size


def watched() -> WatchedSource:
    return WatchedSource("small", 0, wan=WAN, head_blocks=1, vae=VAE)


def stored(path: Path) -> dict[str, np.ndarray]:
    """Initializers of a graph by name, read by the onnx package."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_no_more_than_one_large_weight_is_in_memory(tmp_path: Path) -> None:
    """Tracing keeps the small weights, up to 2048 elements each; nothing keeps a large one."""
    source = watched()
    graph, weights = build(source, "backbone")
    model = trace(graph, weights)
    source.most = source.alive
    save(model, weights, tmp_path, "backbone")
    compare(tmp_path / "backbone.onnx", weights)
    largest = max(shape.numel() for shape, _ in weights.specs.values())
    assert largest == 6 * WAN.dim**2
    assert source.most - source.alive <= largest
    assert source.alive < sum(shape.numel() for shape, _ in weights.specs.values()) / 2


@pytest.mark.long
def test_every_weight_of_the_file_is_the_sources_and_large_ones_begin_on_their_own_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LARGE_BYTES", 9000)
    source = small_source()
    graph, weights = build(source, "backbone")
    path = save(small_graph(graph), weights, tmp_path, "backbone")
    found = stored(path)
    for name, array in found.items():
        original = name.removesuffix(".T").removesuffix(".flat")
        if original in weights:
            expected = source.tensor("student", f"backbone.{original}")
            expected = expected.flatten(1) if ".flat" in name else expected
            assert np.array_equal(array, (expected.T if name.endswith(".T") else expected).numpy()), name
    assert {"blocks.0.ffn.0.weight.T", "time_projection.1.weight", "blocks.0.modulation"} <= {*found}
    model = onnx.load(path, load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    offsets = [(int(entry["offset"]), int(entry["length"])) for entry in entries]
    assert all(offset % (65536 if length >= 9000 else 64) == 0 for offset, length in offsets)
    assert sum(length >= 9000 for _, length in offsets) > 10
    assert compare(path, weights) == len([name for name in found if name in weights and found[name].nbytes > 256])


def test_one_changed_byte_in_the_file_is_found(tmp_path: Path) -> None:
    graph, weights = build(small_source(), "flow_head")
    path = save(small_graph(graph), weights, tmp_path, "flow_head")
    data = bytearray(path.with_name("flow_head.onnx.data").read_bytes())
    data[-1000] ^= 1
    path.with_name("flow_head.onnx.data").write_bytes(data)
    with pytest.raises(ExportError, match=r"does not hold the weight .* of its source"):
        compare(path, weights)


def renamed(model: ir.Model) -> None:
    value = model.graph.initializers["time_projection.1.weight"]
    value.name, value.const_value = "val_7", ir.tensor(np.zeros((288, 480), np.float32))


def reshaped(model: ir.Model) -> None:
    model.graph.initializers["time_projection.1.weight"].shape = ir.Shape([WAN.dim, 6 * WAN.dim])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (renamed, r"constant val_7 is none of the module's weights"),
        (reshaped, r"takes time_projection.1.weight as FLOAT\[48, 288\].*is FLOAT\[288, 48\]"),
    ],
)
def test_a_large_initializer_that_is_no_weight_is_refused(tmp_path: Path, damage, said: str) -> None:
    graph, weights = build(small_source(), "backbone")
    model = small_graph(graph)
    damage(model)
    with pytest.raises(ExportError, match=said):
        save(model, weights, tmp_path, "backbone")


def test_a_source_that_gives_other_sizes_or_values_beyond_float16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_source()
    _, weights = build(source, "backbone", "fp16")
    monkeypatch.setattr(source, "tensor", lambda which, name: torch.full((WAN.dim, WAN.dim), 1e5))
    with pytest.raises(ExportError, match=r"values up to 1e\+05, and float16 ends at 65504"):
        list(weights.chunks("blocks.0.self_attn.q.weight.T"))
    with pytest.raises(ExportError, match=r"ffn\.0\.weight as \[48, 48\] where \[64, 48\] belongs"):
        list(weights.chunks("blocks.0.ffn.0.weight.T"))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("part", ["text_encoder", "backbone", "flow_head", "decoder_step"])
def test_low_precision_is_for_large_products_alone(part: str, precision: str) -> None:
    _, weights = build(small_source(), part, precision)
    dtypes = {dtype for _, dtype in weights.specs.values()}
    assert dtypes == {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    for name, (_, dtype) in weights.specs.items():
        assert (dtype == torch.float32) == bool(EXACT.search(name)), name


@pytest.fixture(scope="module")
def low(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """Graph files and manifest entries of three parts in bfloat16."""
    found = {}
    for part in ("backbone", "decoder_step", "text_encoder"):
        folder, document = tmp_path_factory.mktemp("low"), manifest()
        export_graph(small_source(), part, "bf16", folder, document, True, lambda *_: None)
        found[part] = (folder / f"{part}.onnx", document["graphs"][part])
    return found


def manifest() -> dict:
    from tests.helpers.export_tools import small_export

    return {**small_export().bundle.manifest.model_dump(mode="json"), "graphs": {}}


def test_graphs_in_low_precision_have_float32_edges_and_casts_only_at_boundaries(low: dict) -> None:
    for path, entry in low.values():
        model = onnx.load(path, load_external_data=False)
        assert entry["precision"] == "bf16"
        edges = [spec for spec in entry["inputs"] + entry["outputs"] if spec["dtype"] != "float16"]
        assert {spec["dtype"] for spec in edges} <= {"float32", "int64", "uint8"}
        narrow = [spec["name"] for spec in entry["inputs"] + entry["outputs"] if spec not in edges]
        assert all(name.startswith("cache_") for name in narrow)
        makers = {output: node for node in model.graph.node for output in node.output}
        initializers = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Cast":
                assert node.input[0] not in initializers, node.name
                assert getattr(makers.get(node.input[0]), "op_type", "") != "Cast", node.name
            if node.op_type == "Attention":
                assert any(a.name == "softmax_precision" and a.i == onnx.TensorProto.FLOAT for a in node.attribute)


def test_accuracy_in_low_precision_is_that_of_torch_in_low_precision(low: dict) -> None:
    """The rounding that ONNX Runtime emulates errs about as much as torch's own bfloat16 arithmetic."""
    for part, (_, entry) in low.items():
        assert 0.9999 <= entry["accuracy"]["cosine"] < 1 - 1e-8
        exact, rounded = with_weights(small_source(), part), build(small_source(), part, "bf16")
        rounded[1].fill(rounded[0].module)
        inputs = exact.random_inputs(1, batch=1, frames=5, height=6, width=4, text=100)
        with torch.no_grad():
            results = [graph.module(*inputs.values()) for graph in (exact, rounded[0])]
        first, second = (r if isinstance(r, tuple) else (r,) for r in results)
        error = max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True) if a.is_floating_point())
        assert error / 4 < entry["accuracy"]["max_abs_error"] < 4 * max(error, 1e-3), part


def test_a_large_graph_is_compared_on_few_of_its_blocks_and_all_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_export, "LARGE_BYTES", 0)
    deep = WanConfig(dim=48, ffn_dim=64, num_heads=3, num_layers=5, freq_dim=32, text_dim=24, text_len=8)
    source = RandomSource("deep", 0, wan=deep, head_blocks=1, vae=VAE)
    document, heard = manifest(), []
    report = export_graph(source, "backbone", "fp32", tmp_path, document, True, lambda *step: heard.append(step))
    said = document["graphs"]["backbone"]["accuracy"]["reference"]
    assert re.fullmatch(r"tmd_ref fp32, on blocks 0 and 3 of 4 and \d\d weights compared with their source", said)
    assert report.accuracy is not None and report.accuracy.max_abs_error <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.onnx", "backbone.onnx.data"]
    total = heard[-1][2]
    assert heard[-1] == ("verify", total, total) and total > 4 * 4 * 48 * 48 * 9

    model = onnx.load(tmp_path / "backbone.onnx", load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "Gelu").op_type = "Sigmoid"
    (tmp_path / "other.onnx").write_bytes(model.SerializeToString())
    graph_export._check_likeness(tmp_path / "backbone.onnx", tmp_path / "backbone.onnx", 0)  # as few as are kept
    for more in (0, 2):
        with pytest.raises(ExportError, match="its blocks are not all alike"):
            graph_export._check_likeness(tmp_path / "other.onnx", tmp_path / "backbone.onnx", more)


@pytest.mark.parametrize(
    ("found", "precision", "said"),
    [
        (Accuracy(1.1e-4, 1.0), "fp32", "up to 0.00011 off, more than 0.0001"),
        (Accuracy(float("inf"), 1.0), "fp16", "NaN or Inf"),
        (
            Accuracy(1e-5, 0.99980),
            "bf16",
            "in bf16 the cosine is 0.999800, below 0.9999. Choose --precision backbone=fp32",
        ),
        (Accuracy(0.0, 1.0, 2, 1, 1000), "fp32", "up to 2 levels of 255 off"),
        (Accuracy(0.0, 1.0, 1, 6, 1000), "fp32", "6 of 1000 values"),
    ],
)
def test_every_gate_can_fail(found: Accuracy, precision: str, said: str) -> None:
    with pytest.raises(ExportError) as caught:
        check("backbone", found, precision)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("found", "precision"), [(Accuracy(9e-5, 1.0, 1, 4, 1000), "fp32"), (Accuracy(3e-3, 0.99995, 2, 900, 1000), "fp16")]
)
def test_what_is_within_the_gates_passes(found: Accuracy, precision: str) -> None:
    check("backbone", found, precision)


def test_the_shipped_bundle_with_half_weights_is_readable() -> None:
    import tmd_runtime

    manifest = Bundle.open(Path(tmd_runtime.__file__).parent / "bundles" / "tiny").manifest
    assert manifest.graphs["backbone"].precision in ("fp32", "fp16")
