"""An exported bundle is what its manifest says, computes what the reference does, and appears whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch

import tmd_ref
from tests.helpers.export_tools import (
    TEXT,
    VAE,
    WAN,
    skip_tracing,
    small_export,
    small_graph,
    small_source,
    with_weights,
)
from tmd_engines import Bundle, BundleError, load
from tmd_export import ExportError, Progress, export, export_bundle, graph_export
from tmd_export.families.build import build
from tmd_export.graphs import accuracy as verify
from tmd_export.graphs import trace
from tmd_export.graphs.autoencoder import to_frames
from tmd_export.parts import parse_precision

LATENTS = ["batch", 16, "frames", "height", "width"]
GRAPHS = ("text_encoder", "backbone", "flow_head", "update", "decoder_first", "decoder_step")
INTERFACES: dict[str, tuple[dict[str, list[Any]], dict[str, list[Any]]]] = {
    "text_encoder": (
        {"input_ids": ["batch", "text"], "attention_mask": ["batch", "text"]},
        {"prompt_embeds": ["batch", "text", TEXT.dim]},
    ),
    "backbone": (
        {
            "x": LATENTS,
            "t": ["batch"],
            "prompt_embeds": ["batch", "text", WAN.text_dim],
            "rope_cos": ["tokens", 8],
            "rope_sin": ["tokens", 8],
        },
        {"features": ["batch", "tokens", WAN.dim], "context": ["batch", "text", WAN.dim]},
    ),
    "flow_head": (
        {
            "y": LATENTS,
            "noise": LATENTS,
            "s": ["batch"],
            "r": ["batch"],
            "features": ["batch", "tokens", WAN.dim],
            "context": ["batch", "text", WAN.dim],
            "rope_cos": ["tokens", 8],
            "rope_sin": ["tokens", 8],
        },
        {"y_next": LATENTS},
    ),
    "update": (
        {
            **dict.fromkeys(("x", "velocity", "negative", "noise", "before_1", "before_2"), LATENTS),
            "coefficients": [7],
        },
        {"x_next": LATENTS, "data": LATENTS, "magnitude": [1]},
    ),
}


@pytest.mark.parametrize("part", INTERFACES)
def test_graphs_have_the_documented_names_in_order_and_sizes(part: str) -> None:
    info = small_export().bundle.manifest.graphs[part]
    for specs, documented in zip((info.inputs, info.outputs), INTERFACES[part], strict=True):
        assert [(spec.name, list(spec.shape)) for spec in specs] == list(documented.items())


def test_decoders_pass_the_same_caches_and_give_frames() -> None:
    first, step = (small_export().bundle.manifest.graphs[name] for name in ("decoder_first", "decoder_step"))
    for graph in (first, step):
        assert [spec.name for spec in graph.outputs[-2:]] == ["frames", "magnitude"]
    caches = {f"cache_{k:02d}": spec.shape for k, spec in enumerate(first.outputs[:-2])}
    assert len(caches) == 11
    assert {spec.name: spec.shape for spec in first.outputs[:-2]} == caches
    assert {spec.name: spec.shape for spec in step.inputs[1:]} == caches
    assert {spec.name.removesuffix("_next"): spec.shape for spec in step.outputs[:-2]} == caches
    assert step.outputs[-2].shape == ("batch", 2, "2*height", "2*width", 3)
    assert first.outputs[-2].shape == ("batch", 1, "2*height", "2*width", 3)
    assert first.outputs[-2].dtype == step.outputs[-2].dtype == "uint8"


def test_the_manifest_tells_model_sizes_and_measured_accuracy() -> None:
    result = small_export()
    manifest = Bundle.open(result.bundle.folder).manifest
    assert list(manifest.graphs) == [graph.name for graph in result.graphs] == list(GRAPHS)
    assert (manifest.schema_version, manifest.model.family, manifest.model.architecture) == (2, "tmd", "wan2.1-t2v")
    assert manifest.sampler.rule == "euler"
    assert (manifest.model.num_layers, manifest.model.head_blocks, manifest.model.head_dim) == (2, 1, 16)
    assert (manifest.latents.temporal_stride, manifest.latents.spatial_stride) == (2, 2)
    assert manifest.latents.mean == VAE.latents_mean
    assert (manifest.text.tokenizer, manifest.text.max_length, manifest.text.dim) == (None, 8, 24)
    assert manifest.provenance.source == "random weights, seed 0"
    assert manifest.provenance.versions["torch"] == torch.__version__
    for graph in manifest.graphs.values():
        assert (graph.opset, graph.precision, graph.storage) == (23, "fp32", None)
        assert graph.accuracy is not None
        assert graph.accuracy.max_abs_error <= 1e-4
        assert graph.accuracy.cosine > 0.999999
        assert graph.accuracy.reference.startswith("tmd_ref fp32")


def test_graphs_hold_weights_by_name_and_nothing_of_this_machine() -> None:
    bundle = small_export().bundle
    backbone = onnx.load(bundle.graph_path("backbone"), load_external_data=False)
    names = {weight.name for weight in backbone.graph.initializer}
    assert {"blocks.0.self_attn.q.weight.T", "blocks.0.ffn.2.bias", "blocks.0.modulation"} <= names
    repository = str(Path(tmd_ref.__file__).parents[1]).encode()
    for part in GRAPHS:
        content = bundle.graph_path(part).read_bytes()
        assert repository not in content and b"stack_trace" not in content


def test_canonical_operators_stand_for_the_layers() -> None:
    def count(part: str, operator: str) -> int:
        model = onnx.load(small_export().bundle.graph_path(part), load_external_data=False)
        return sum(node.op_type == operator for node in model.graph.node)

    assert count("backbone", "Attention") == count("backbone", "RotaryEmbedding") == 2
    assert count("backbone", "RMSNormalization") == 4
    assert count("backbone", "LayerNormalization") == 3
    assert count("backbone", "Gelu") == 2  # a block's feed-forward, and the text embedding
    assert count("decoder_step", "Attention") == 1
    assert count("text_encoder", "Attention") == 1


@pytest.mark.parametrize(
    "mixed", ["bf16,decoder_first=fp32", "decoder_step=fp16", "bf16,decoder=int8,decoder_step=fp32"]
)
def test_decoders_of_32_and_16_bits_do_not_go_together(mixed: str) -> None:
    with pytest.raises(ValueError, match="choose one precision for both"):
        parse_precision(mixed)
    parse_precision("fp16,decoder_first=bf16")  # both have caches of 16 bits


def decoded_frame_by_frame(bundle: Bundle, latents: torch.Tensor, name: str = "onnxruntime") -> np.ndarray:
    dims, chunks = {"batch": 1, "height": latents.shape[3], "width": latents.shape[4]}, []
    caches: dict[str, np.ndarray] = {}
    for k, part in enumerate(("decoder_first", *["decoder_step"] * (latents.shape[2] - 1))):
        with load(bundle, part, name, threads=1) as engine:
            inputs = {"latents": latents[:, :, k : k + 1].numpy().copy(), **caches}
            outputs = {name: engine.empty(name, **dims) for name in engine.outputs}
            engine.run(inputs, outputs)
        chunks.append(outputs.pop("frames"))
        assert np.isfinite(outputs.pop("magnitude")).all()
        caches = {name.removesuffix("_next"): value for name, value in outputs.items()}
    return np.concatenate(chunks, axis=1).astype(int)


@torch.no_grad()
def test_decoding_frame_by_frame_equals_the_reference_decoding_at_once() -> None:
    vae: Any = with_weights(small_source(), "decoder_first").module.vae
    latents = torch.randn(1, 16, 4, 3, 5, generator=torch.Generator().manual_seed(5))
    expected = to_frames(vae.decode(latents))[0].numpy()
    assert len(np.unique(expected)) > 100
    difference = np.abs(decoded_frame_by_frame(small_export().bundle, latents) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.005


@torch.no_grad()
@pytest.mark.parametrize(("precision", "mean", "most"), [("fp16", 0.1, 2), ("bf16", 0.6, 6)])
def test_a_decoder_in_16_bits_keeps_16_bits_between_frames(
    precision: str, mean: float, most: int, tmp_path: Path
) -> None:
    parts = ("decoder_first", "decoder_step")
    bundle = export_bundle(small_source(), tmp_path / "bundle", parts, precision=precision, verify=False).bundle
    step = bundle.manifest.graphs["decoder_step"]
    kinds = [spec.dtype for spec in step.inputs if spec.name.startswith("cache_")]
    assert kinds == ["float32", *["float16"] * 9, "float32"]  # the first and the last convolution are exact
    latents = torch.randn(1, 16, 4, 3, 5, generator=torch.Generator().manual_seed(5))
    graph, weights = build(small_source(), "decoder_first", precision)
    weights.fill(graph.module)
    vae: Any = graph.module.vae  # in the precision of the bundle
    expected = to_frames(vae.decode(latents))[0].numpy()
    for name in ("onnxruntime", "openvino"):
        difference = np.abs(decoded_frame_by_frame(bundle, latents, name) - expected)
        assert difference.mean() < mean and difference.max() <= most


def test_the_same_seed_gives_the_same_files_and_skipping_the_comparison_is_told(tmp_path: Path) -> None:
    heard = []
    result = export_bundle(
        small_source(), tmp_path / "again", ("text_encoder",), verify=False, report=lambda step: heard.append(step)
    )
    first, again = (bundle.manifest for bundle in (small_export().bundle, result.bundle))
    assert set(again.files) == {"text_encoder.onnx", "text_encoder.onnx.data"}
    for name, file in again.files.items():
        assert first.files[name] == file
    assert again.graphs["text_encoder"].accuracy is None
    assert list(dict.fromkeys((step.graph, step.stage, step.total) for step in heard)) == [
        ("text_encoder", "trace", 1),
        ("text_encoder", "write", 1),
    ]
    written = [step.bytes_done for step in heard if step.stage == "write"]
    assert written == sorted(written) and 0 < written[-1] == heard[-1].bytes_total


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_trace(graph, weights):
        model = small_graph(graph)
        norm = next(node for node in model.graph if node.op_type == "RMSNormalization")
        norm.attributes["epsilon"] = onnx_ir.AttrFloat32("epsilon", 2e-3)
        return model

    small_export()
    monkeypatch.setattr(graph_export, "trace", wrong_trace)
    with pytest.raises(ExportError, match=r"text_encoder on ONNX Runtime differs .* more than 0\.0001"):
        export_bundle(small_source(), tmp_path / "bundle", ("text_encoder",))
    assert not list(tmp_path.iterdir())


def test_a_graph_that_breaks_a_rule_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_trace(graph, weights):
        model = small_graph(graph)
        model.graph[3].metadata_props["note"] = "from here"
        return model

    small_export()
    monkeypatch.setattr(graph_export, "trace", wrong_trace)
    with pytest.raises(ExportError, match="carries notes"):
        export_bundle(small_source(), tmp_path / "bundle", ("text_encoder",))
    assert not list(tmp_path.iterdir())


def test_a_graph_with_a_size_fixed_by_its_module_is_refused() -> None:
    graph, _ = build(small_source(), "text_encoder")
    model = small_graph(graph)
    model.graph.outputs[0].shape = onnx_ir.Shape(["batch", 5, TEXT.dim])
    with pytest.raises(ExportError, match=r"prompt_embeds came out with shape \['batch', '5', '24'\] instead of"):
        trace._apply_interface(model, graph)


def test_a_module_that_torch_cannot_export_is_one_sentence() -> None:
    graph, weights = build(small_source(), "text_encoder")
    graph.module.forward = lambda ids, mask: ids if ids.sum() > 3 else mask  # a branch on values
    with pytest.raises(ExportError, match=r"^torch .* cannot export text_encoder: Could not guard on data[^\n\x1b]*$"):
        trace.trace(graph, weights)


def test_a_reference_that_gives_nan_is_not_compared() -> None:
    graph = with_weights(small_source(), "text_encoder")
    module: Any = graph.module
    module.norm.weight.fill_(float("nan"))
    with pytest.raises(ExportError, match="nothing can be compared"):
        verify.reference(graph)


def test_an_interrupt_while_weights_are_written_leaves_nothing_and_the_next_run_starts_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_tracing(monkeypatch)
    # A caller that ignores Ctrl-C, as a shell does for jobs in the background, hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted: list[str] = []

    def interrupt(step: Progress) -> None:
        if step.bytes_done and not interrupted:
            interrupted.extend(path.name for folder in tmp_path.iterdir() for path in folder.iterdir())
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        export_bundle(small_source(), tmp_path / "bundle", ("backbone",), report=interrupt)
    assert interrupted == ["backbone.onnx.data"]
    assert not list(tmp_path.iterdir())
    result = export_bundle(small_source(), tmp_path / "bundle", ("backbone",), report=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"] and result.graphs[0].accuracy is not None


def test_an_existing_bundle_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="exists already"):
        export_bundle(small_source(), tmp_path / "taken", ("text_encoder",))
    assert (tmp_path / "taken" / "manifest.json").read_text() == "{}"


def test_a_disk_that_is_too_small_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 99_000}))
    with pytest.raises(ExportError, match=r"the bundle takes about .* and 99\.0 kB are free"):
        export_bundle(small_source(), tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"), [({"parts": ("head",)}, "no part 'head'"), ({"precision": "int3"}, "no precision 'int3'")]
)
def test_unknown_choices_are_named(tmp_path: Path, arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        export_bundle(small_source(), tmp_path / "bundle", **arguments)
