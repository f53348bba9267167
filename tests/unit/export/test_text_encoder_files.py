"""The text encoder's two large files: an embedding table outside of the graph, and matrices stored as int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import tmd_runtime
from tests.helpers.export_tools import VAE, WAN, small_export, small_source
from tests.helpers.synthetic import (
    TEXT_DIM,
    VOCABULARY,
    GraphBuilder,
    manifest_without_files,
    text_encoder,
    tokenizer_bytes,
    write_graph,
)
from tmd_engines import Bundle, BundleWriter, load
from tmd_export import ExportError, ExportResult, RandomSource, export_bundle
from tmd_export.families.build import build
from tmd_export.graphs import text as graphs
from tmd_export.weights import int8
from tmd_ref.umt5 import UMT5Config
from tmd_runtime.text.embedding import TokenEmbedding

IDS = np.array([[7, 3, 49, 1, 0, 0]])
MASK = np.array([[1, 1, 1, 1, 0, 0]])
# As many heads as UMT5-XXL: the table of their position biases is folded into a constant that is larger than itself.
WIDE = UMT5Config(vocab_size=50, dim=128, num_heads=64, head_dim=2, ffn_dim=256, num_layers=2)


def encode(bundle: Bundle) -> np.ndarray:
    """prompt_embeds of `IDS`, whichever of the two inputs the graph takes."""
    table = bundle.manifest.text.embedding
    first = {"input_ids": IDS} if table is None else {"token_embeds": TokenEmbedding(bundle.folder, table)(IDS)}
    with load(bundle, "text_encoder", engine="onnxruntime", threads=1) as engine:
        result = engine.empty("prompt_embeds", batch=1, text=IDS.shape[1])
        engine.run({**first, "attention_mask": MASK}, {"prompt_embeds": result})
    return result


def test_a_table_outside_of_the_graph_gives_the_same_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encode(small_export().bundle)  # made before the limit changes: all tests share it
    monkeypatch.setattr(graphs, "TABLE_BYTES", 1000)  # the small table has 4800
    bundle = export_bundle(small_source(), tmp_path / "bundle", ("text_encoder",)).bundle
    table = bundle.manifest.text.embedding
    assert table is not None and (table.rows, table.dim, table.dtype) == (50, 24, "float32")
    assert [spec.name for spec in bundle.manifest.graphs["text_encoder"].inputs] == ["token_embeds", "attention_mask"]
    stored = small_source().tensor("text_encoder", "token_embedding.weight").numpy()
    assert np.array_equal(np.fromfile(bundle.folder / table.file, "<f4").reshape(50, 24), stored)
    assert expected.std() > 0.3
    assert np.abs(encode(bundle) - expected).max() <= 1e-6


def test_only_umt5_xxls_table_is_outside() -> None:
    def first_input(config: UMT5Config) -> str:
        source = RandomSource("small", 0, wan=WAN, head_blocks=1, vae=VAE, text=config)
        return build(source, "text_encoder")[0].inputs[0].name

    assert first_input(UMT5Config(512, 64, 4, 16, 128, 1)) == "input_ids"
    assert first_input(UMT5Config(256_384, 4096, 64, 64, 10_240, 1)) == "token_embeds"


def test_a_pipeline_reads_rows_where_the_bundle_has_a_table(tmp_path: Path, synthetic_bundle: Path) -> None:
    whole = text_encoder()
    rows = GraphBuilder("text_encoder")
    rows.input("token_embeds", ["batch", "text", TEXT_DIM])
    rows.input("attention_mask", ["batch", "text"], "int64")
    keep = rows.op("Cast", "attention_mask", to=onnx.TensorProto.FLOAT)
    rows.op("Mul", "token_embeds", rows.op("Unsqueeze", keep, rows.constant([2], np.int64)), out="prompt_embeds")
    rows.output("prompt_embeds", ["batch", "text", TEXT_DIM])
    with BundleWriter(tmp_path / "rows") as writer:
        document = manifest_without_files({"text_encoder": write_graph(writer.folder, rows)})
        document["graphs"]["text_encoder"]["data"] = None  # without large weights it has none
        document["text"]["embedding"] = {"file": "t.bin", "dtype": "float32", "rows": VOCABULARY, "dim": TEXT_DIM}
        (writer.folder / "text_encoder.onnx.data").unlink(missing_ok=True)
        (writer.folder / "t.bin").write_bytes(onnx.numpy_helper.to_array(whole.weights[0]).tobytes())
        (writer.folder / "tokenizer.model").write_bytes(tokenizer_bytes())
        bundle = writer.commit(document)
    prompt = "a red circle moving right"
    expected = tmd_runtime.load(synthetic_bundle, threads=1).encode(prompt)
    assert expected.any()
    assert np.array_equal(tmd_runtime.load(bundle, threads=1).encode(prompt), expected)


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30], ids=["block by block", "at once"])
def test_int8_values_are_the_nearest_of_each_block(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "CHUNK_BYTES", chunk_bytes)
    source = RandomSource("wide", 0, wan=replace(WAN, text_dim=128), head_blocks=1, vae=VAE, text=WIDE)
    name, block = "blocks.0.ffn.fc2.weight.T", 64
    weights = int8.Int8Weights(build(source, "text_encoder")[1], {name: block})
    exact = source.tensor("text_encoder", "blocks.0.ffn.fc2.weight").double().numpy().T  # [K, N]
    values, scales = (torch.cat(list(weights.chunks(name + kind))).double().numpy() for kind in (".int8", ".scale"))
    assert weights.form(f"{name}.int8") == (values.shape, torch.int8)
    assert weights.form(f"{name}.scale") == (scales.shape, torch.float32) == ((256 // block, 128), torch.float32)
    largest = np.abs(exact.reshape(-1, block, 128)).max(axis=1)
    assert np.allclose(scales, largest / 127, rtol=1e-6)
    spread = np.repeat(scales, block, axis=0)
    assert np.abs(values * spread - exact).max() <= 0.5001 * scales.max()
    assert (np.abs(values * spread - exact) <= 0.5001 * spread).all()
    assert np.abs(values).max() == 127


@pytest.fixture(scope="module")
def int8_export(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    source = RandomSource("wide", 0, wan=replace(WAN, text_dim=128), head_blocks=1, vae=VAE, text=WIDE)
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return export_bundle(source, folder, ("text_encoder",), text_encoder_weights="int8", precision="bf16")


def test_int8_weights_are_told_measured_and_small(int8_export: ExportResult) -> None:
    bundle = int8_export.bundle
    info = bundle.manifest.graphs["text_encoder"]
    assert (info.precision, info.storage) == ("fp32", "int8")
    assert info.accuracy is not None and 0.999 < info.accuracy.cosine < 0.999999
    model = onnx.load(bundle.graph_path("text_encoder"), load_external_data=False)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    matrices = [name for name in types if name.endswith(".int8")]
    assert len(matrices) == 7 * WIDE.num_layers  # q, k, v, o, gate, fc1, fc2
    assert all(types[name] == onnx.TensorProto.INT8 for name in matrices)
    values = WIDE.num_layers * (4 * 128 * 128 + 3 * 128 * 256)
    size = bundle.manifest.files["text_encoder.onnx.data"].size
    assert values < size < 1.5 * values  # and not 4 times: scales, norms, the embedding and the gaps come on top


def test_openvino_runs_int8_weights_as_onnx_runtime_does(int8_export: ExportResult) -> None:
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(
        int8_export.bundle.graph_path("text_encoder"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    found = model([IDS, MASK])[0]
    expected = encode(int8_export.bundle)
    cosine = (found * expected).sum() / np.linalg.norm(found) / np.linalg.norm(expected)
    assert cosine > 0.999


def test_a_result_too_far_off_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = RandomSource("wide", 0, wan=replace(WAN, text_dim=128), head_blocks=1, vae=VAE, text=WIDE)
    chunks = int8.Int8Weights.chunks

    def without_scales(self, name):
        for piece in chunks(self, name):
            yield torch.full_like(piece, 0.01) if name.endswith(".scale") else piece

    monkeypatch.setattr(int8.Int8Weights, "chunks", without_scales)
    with pytest.raises(ExportError, match=r"in int8-weights the cosine is .*, below 0\.99"):
        export_bundle(source, tmp_path / "bundle", ("text_encoder",), text_encoder_weights="int8")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cannot be stored as 'int4'"):
        export_bundle(source, tmp_path / "bundle", ("text_encoder",), text_encoder_weights="int4")
