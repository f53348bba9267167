"""Transition Models in 8 bits: which products, which samplings they are calibrated on, what engines make of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tim_models import CLASSES_16 as CLASSES
from tests.helpers.tim_models import PARTS, TEXT_16, network
from tmd_engines import load
from tmd_export import ExportError, ExportResult, export_bundle
from tmd_export.families import ExportFamily
from tmd_export.families.tim import TIM
from tmd_export.families.tmd import TMD
from tmd_export.quantization.calibration import FILE, read_calibration
from tmd_export.quantization.observe import Observed
from tmd_export.quantization.samplings import Samplings, latent_size
from tmd_export.sources.tim import RandomTiM, TiMFolder
from tmd_ref.tim.model import TiMConfig

TEXT = replace(TEXT_16, num_layers=1)
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
    assert found.steps == ((1, 1), (4, 1), (8, 1), (16, 1)) and found.latents == (1, 8, 8)
    rounded = [graph for graph in quantized.graphs if graph.precision != "fp32"]
    assert [graph.name for graph in rounded] == list(PARTS)
    assert all(graph.accuracy and 0.99 < graph.accuracy.cosine < 0.99999 for graph in rounded)


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


@pytest.mark.long
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("config", [TEXT, CLASSES], ids=["text", "classes"])
def test_calibration_watches_a_run_and_the_jumps_that_end_one_early(
    config: TiMConfig, guidance: float, tmp_path: Path
) -> None:
    bundle = export_bundle(RandomTiM("small", 3, config), tmp_path / "b", PARTS, verify=False).bundle
    sampler = bundle.manifest.sampler.model_copy(update={"guidance": guidance})
    graphs = {part: Observed(bundle, part, TIM.products) for part in PARTS}
    seen: list[tuple[float, float, int]] = []

    def watch(inputs: dict[str, np.ndarray], _: dict[str, np.ndarray]) -> None:
        for given in (inputs, *TIM.beside("flow_head", inputs)):
            seen.append((float(given["t"][0]), float(given["r"][0]), len(given["x"])))
            whole = graphs["flow_head"](TIM.compared("flow_head", given))["x_next"]
            part = graphs["flow_head"](given)["x_next"]
            length = (given["t"] - given["r"])[:, None, None, None, None]
            assert np.abs(given["x"] + length * (whole - given["x"]) - part).max() < 1e-5

    graphs["flow_head"].watch = watch
    with load(bundle, "update") as update:
        manifest = bundle.manifest.model_copy(update={"sampler": sampler})
        runs = Samplings(manifest, TIM, {**graphs, "update": update})
        (condition,) = runs.conditions(["unread"], None, 0)
        assert (condition.negative is None) == (guidance == 1) or config is CLASSES
        runs.run(condition, 5, 4, 1)
    both = 1 if guidance == 1 else 2
    assert seen == [
        (1.0, 0.75, 1), (0.75, 0.5, both), (0.75, 0.0, both), (0.5, 0.25, both), (0.5, 0.0, both), (0.25, 0.0, both),
    ]  # fmt: skip
    assert runs.counts == [(1, 1), (4, 1), (8, 1), (16, 1)]


@pytest.mark.parametrize(
    ("family", "patch", "frames", "side", "size"),
    [
        (TIM, 2, 1, 64, (1, 8, 8)),
        (TIM, 2, 1, 1024, (1, 16, 16)),
        (TIM, 1, 1, 1024, (1, 8, 8)),
        (TMD, 2, 81, 832, (2, 12, 12)),
    ],
)
def test_large_pictures_are_calibrated_on_small_ones(
    family: ExportFamily, patch: int, frames: int, side: int, size: tuple[int, int, int]
) -> None:
    manifest: Any = SimpleNamespace(
        model=SimpleNamespace(patch_size=(1, patch, patch)),
        latents=SimpleNamespace(spatial_stride=8, temporal_stride=4),
        video=SimpleNamespace(frames=frames, height=side, width=side),
    )
    assert latent_size(manifest, family) == size


@pytest.mark.long
def test_the_table_of_classes_is_not_quantized(tmp_path: Any) -> None:
    source = RandomTiM("small", 0, CLASSES)
    bundle = export_bundle(source, tmp_path / "b", PARTS, precision="int8", keep_layers=False).bundle
    assert {name: graph.precision for name, graph in bundle.manifest.graphs.items()} == {
        "backbone": "bf16", "flow_head": "int8", "update": "fp32",
    }  # fmt: skip


def test_prompts_without_a_text_encoder_are_refused(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    tensors = network(RandomTiM("x", 0, CLASSES)).state_dict()
    save_file({name: weight.half() for name, weight in tensors.items()}, tmp_path / "c2i_model_256.safetensors")
    tensors = network(RandomTiM("x", 0, TEXT)).state_dict()
    torch.save(tensors, tmp_path / "t2i_model.bin")
    with pytest.raises(ExportError, match="text_encoder is not among the parts"):
        export_bundle(TiMFolder(tmp_path, "tim-t2i", TEXT), tmp_path / "out", PARTS, precision="int8")
