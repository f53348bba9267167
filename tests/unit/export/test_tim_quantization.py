"""Transition Models in 8 bits: which products, which samplings they are calibrated on, what engines make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.export.test_tim_bundle import CLASSES, PARTS, network
from tests.unit.ref import test_tim
from tmd_engines import load
from tmd_export import ExportError, ExportResult, export_bundle
from tmd_export.quantization.calibration import FILE, read_calibration
from tmd_export.quantization.inputs import latent_size, rope
from tmd_export.quantization.rollout import rollout, step_counts
from tmd_export.sources.tim import RandomTiM, TiMFolder
from tmd_ref.tim.sampling import tim_sample, uniform_times
from tmd_ref.tim.split import SplitTiM

TEXT = replace(test_tim.TEXT, in_channels=16, num_layers=1)
BLOCK = ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    out, precision = tmp_path_factory.mktemp("tim") / "quantized", "flow_head=fp8,backbone=int8"
    return export_bundle(RandomTiM("small", 3, TEXT), out, PARTS, precision=precision, calibration=["one"])


def test_the_products_of_the_blocks_are_quantized_and_no_others(quantized: ExportResult) -> None:
    found = read_calibration(quantized.bundle.folder / FILE)
    assert set(found.sensitivity["int8"]["backbone"].layers) == {"sides.0.kv"}
    attentions = {"blocks.0.attn.attention", "blocks.0.cross_attn.attention"}
    assert set(found.sensitivity["fp8"]["flow_head"].layers) == {f"blocks.0.{name}" for name in BLOCK} | attentions
    assert found.steps == ((1, 1), (4, 1), (8, 1), (16, 1)) and found.latents == (1, 16, 16)
    assert all(graph.accuracy and 0.99 < graph.accuracy.cosine < 0.99999 for graph in quantized.graphs)


def test_openvino_computes_the_integer_products_too(quantized: ExportResult) -> None:
    pytest.importorskip("openvino")
    given = {"prompt_embeds": np.random.default_rng(0).standard_normal((1, 5, 20), np.float32)}
    found = []
    for engine in ("onnxruntime", "openvino"):
        with load(quantized.bundle, "backbone", engine) as loaded:
            context = loaded.empty("context", batch=1, text=5)
            loaded.run(given, {"context": context})
            found.append(context)
    assert np.linalg.norm(found[0] - found[1]) < 0.02 * np.linalg.norm(found[0])


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("config", [TEXT, CLASSES], ids=["text", "classes"])
def test_the_loop_that_is_calibrated_on_is_the_sampler(config: Any, guidance: float) -> None:
    model = network(RandomTiM("small", 3, config))
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((2, 16, 1, 4, 6), np.float32)
    if config is CLASSES:
        condition, null = np.array([1, 4]), np.array([5, 5])
    else:
        condition, null = (rng.standard_normal((2, 5, 20), np.float32) for _ in range(2))
    document = {"kind": "tim", "rope": "index", "head_dim": config.head_dim, "patch_size": (1, *[config.patch] * 2)}
    tables = rope({"model": document}, noise.shape[2:])
    times, given = uniform_times(4), (torch.from_numpy(part) for part in (noise.squeeze(2), condition))
    expected = tim_sample(model, *given, times, torch.from_numpy(null), guidance)
    split = SplitTiM(network(RandomTiM("small", 3, config)))
    asked: list[tuple[float, float, int]] = []

    def head(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        asked.append((float(inputs["t"][0]), float(inputs["r"][0]), len(inputs["x"])))
        names = ("x", "t", "r", "guidance", "context", "rope_cos", "rope_sin")
        return {"x_next": split.transition(*(torch.from_numpy(inputs[name]) for name in names)).numpy()}

    def backbone(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"context": split.prompt(torch.from_numpy(*inputs.values())).numpy()}

    sampler = {"rule": "flow_map", "steps": 4, "guidance": guidance, "guidance_interval": [0.0, 1.0]}
    found = rollout(backbone, head, sampler, rng, noise, condition, null, tables, 4)
    assert np.abs(found.squeeze(2) - expected.numpy()).max() < 1e-4
    both = 2 if guidance == 1 else 4
    jumps = [(0.75, 0.0, both), (0.5, 0.0, both)]  # 0.25 to 0 is the last step
    assert asked == [(1.0, 0.75, 2), (0.75, 0.5, both), (0.5, 0.25, both), (0.25, 0.0, both), *jumps]
    assert step_counts(sampler) == [(1, 1), (4, 1), (16, 1)]


@pytest.mark.parametrize(
    ("kind", "patch", "frames", "side", "size"),
    [
        ("tim", 2, 1, 64, (1, 8, 8)),
        ("tim", 2, 1, 1024, (1, 32, 32)),
        ("tim", 1, 1, 1024, (1, 16, 16)),
        ("tmd", 2, 81, 832, (2, 20, 20)),
    ],
)
def test_large_pictures_are_calibrated_on_small_ones(
    kind: str, patch: int, frames: int, side: int, size: tuple[int, int, int]
) -> None:
    assert latent_size({
        "model": {"kind": kind, "patch_size": (1, patch, patch)},
        "latents": {"spatial_stride": 8, "temporal_stride": 4},
        "video": {"frames": frames, "height": side, "width": side},
    }) == size  # fmt: skip


def test_the_table_of_classes_is_not_quantized(tmp_path: Any) -> None:
    source = RandomTiM("small", 0, CLASSES)
    bundle = export_bundle(source, tmp_path / "b", PARTS, precision="int8", keep_layers=False).bundle
    assert {name: graph.precision for name, graph in bundle.manifest.graphs.items()} == {
        "backbone": "bf16", "flow_head": "int8",
    }  # fmt: skip


def test_prompts_without_a_text_encoder_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    tensors = network(RandomTiM("x", 0, CLASSES)).state_dict()
    save_file({name: weight.half() for name, weight in tensors.items()}, tmp_path / "c2i_model_256.safetensors")
    tensors = network(RandomTiM("x", 0, TEXT)).state_dict()
    torch.save(tensors, tmp_path / "t2i_model.bin")
    with pytest.raises(ExportError, match="text_encoder is not among the parts"):
        export_bundle(TiMFolder(tmp_path, "tim-t2i", TEXT), tmp_path / "out", PARTS, precision="int8")
