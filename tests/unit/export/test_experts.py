"""Wan2.2-A14B as a source of weights: which file is which expert, what they share, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import expert_files as files
from tests.helpers import lora_files
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal
from tmd_export import LoraFile, open_source
from tmd_export.checkpoints.experts import expert_named, expert_of_lora, experts_of
from tmd_export.checkpoints.names import uncut
from tmd_export.families import sampling_of
from tmd_export.parts import TWO_TRANSFORMERS
from tmd_export.sources.experts import TwoTransformers
from tmd_export.sources.loras import SECOND, with_loras


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return files.write_original(tmp_path_factory.mktemp("official") / "Wan2.2-T2V-A14B")


def two(*paths: Path, **sizes: Any) -> TwoTransformers:
    found = experts_of(paths)
    assert found is not None
    return TwoTransformers(found, "small", **{**made.SIZES, **sizes})


def test_each_transformer_has_its_own_weights(official: Path) -> None:
    source = two(official)
    for which, state in (("student", made.models().state("transformer")), (SECOND, files.low())):
        names = [name for name, _ in source.module(which).named_parameters()]
        assert len(names) > 50
        for name in names:
            stored = uncut(name, made.WAN.num_layers - made.SIZES["head_blocks"])
            assert torch.equal(source.tensor(which, name), state[stored]), name
    hashes = source.sha256(TWO_TRANSFORMERS)
    assert sum(name.startswith("low_noise_model/") for name in hashes) == 6
    assert sum("high_noise_model/" in name for name in hashes) == 6
    assert set(source.sha256(("backbone_2",))) == {name for name in hashes if name.startswith("low_noise_model/")}


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"),
        (
            "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
            "Wan2_2-T2V-A14B-LOW_fp8_e4m3fn_scaled_KJ.safetensors",
        ),
        ("Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf", "Wan2.2-T2V-A14B-LowNoise-Q4_K_M.gguf"),
        ("high_noise_model", "low_noise_model"),
    ],
)
def test_names_tell_which_is_which_in_any_order(high: str, low: str, tmp_path: Path) -> None:
    vae = tmp_path / "wan_2.1_vae.safetensors"
    for paths in ((tmp_path / high, tmp_path / low, vae), (vae, tmp_path / low, tmp_path / high)):
        found = experts_of(paths)
        assert found is not None and (found.high.name, found.low.name, found.others) == (high, low, (vae,))
    assert experts_of([tmp_path / high, vae]) is None
    assert "give one of each" in refusal(
        lambda: experts_of([tmp_path / high, tmp_path / "other" / high, tmp_path / low])
    )


@pytest.mark.parametrize("name", ["highlights.safetensors", "flow_noise.safetensors", "slow.pth", "lowlands"])
def test_names_that_only_look_alike_are_no_experts(name: str, tmp_path: Path) -> None:
    assert expert_named(tmp_path / name) is None


def test_the_boundary_is_the_folders_or_the_models_own(official: Path, tmp_path: Path) -> None:
    assert two(official).boundary == 0.875
    folder = files.write_diffusers(tmp_path / "A14B", boundary=0.9)
    source = two(folder)
    assert source.boundary == 0.9
    for preset in (None, "wan2.2-a14b", "lightning"):
        assert sampling_of(source, preset).sampler["boundary"] == 0.9
    index = folder / "model_index.json"
    for value in (0, 1.5, "0.9", True, None):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": value}))
        assert "boundary_ratio" in refusal(lambda: two(folder))


def test_experts_of_other_sizes_do_not_belong_together(official: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(official, tmp_path / "A14B")
    (folder / "low_noise_model" / "config.json").write_text(json.dumps(made.original_config() | {"num_heads": 6}))
    found = experts_of([folder])
    assert found is not None
    assert "sizes" in refusal(lambda: TwoTransformers(found))


def test_a_folder_of_an_a14b_is_used_whole(official: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(official, tmp_path / "A14B")
    (folder / "other").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "other" / "model.safetensors")
    assert "which is not used here" in refusal(lambda: two(folder))


def test_an_expert_given_by_itself_replaces_that_of_a_folder(official: Path, tmp_path: Path) -> None:
    distilled = tmp_path / "wan2.2_t2v_A14b_low_noise_lightx2v_4step.safetensors"
    save_file(made.models().state("transformer"), distilled)
    source = two(distilled, official)
    name = "backbone.blocks.0.ffn.0.weight"
    stored = "blocks.0.ffn.0.weight"
    for which in ("student", SECOND):
        assert torch.equal(source.tensor(which, name), made.models().state("transformer")[stored])
    assert source.default_parts == TWO_TRANSFORMERS
    assert "give one of each" in refusal(lambda: experts_of([official, distilled, tmp_path / f"copy_{distilled.name}"]))


def test_full_size_is_called_by_its_name(tmp_path: Path) -> None:
    from tmd_ref.wan import WAN_CONFIGS, WanTransformer

    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in WanTransformer(WAN_CONFIGS["wan14b"]).named_parameters()}
    paths = [made.write_hollow(tmp_path / f"wan_{side}_noise.safetensors", shapes, "BF16") for side in ("high", "low")]
    source = open_source(None, paths)
    assert source.model == "wan2.2-a14b" and source.default_parts == (
        "backbone",
        "flow_head",
        "backbone_2",
        "flow_head_2",
    )
    assert source.model_entry()["architecture"] == "wan2.2-t2v-a14b"
    sampler = sampling_of(source).sampler
    assert (sampler["steps"], sampler["shift"], sampler["guidance"], sampler["guidance_2"]) == (40, 12.0, 4.0, 3.0)


@pytest.mark.parametrize(
    ("path", "side"),
    [
        ("style.safetensors", None),
        ("style_HIGH.safetensors", "high"),
        ("low-vram/style.safetensors", None),
        ("Wan2.2-Lightning/high_noise_model/lora.safetensors", "high"),
        ("low noise/lora.safetensors", "low"),
        ("low noise/style-high.safetensors", "high"),
        ("transformer_2/lora.safetensors", None),
    ],
)
def test_a_folder_says_which_noise_a_lora_is_for_if_it_says_noise(path: str, side: str | None) -> None:
    assert expert_of_lora(Path(path)) == side


def test_a_lora_goes_where_its_name_says(official: Path, tmp_path: Path) -> None:
    source, given = two(official), list[LoraFile]()
    for name in ("a_HIGH_lora.safetensors", "low_noise_model.safetensors", "style.safetensors"):
        save_file(lora_files.random_lora(seed=len(given)).tensors(), tmp_path / name)
        given.append(LoraFile(tmp_path / name))
    merged = with_loras(source, given)
    assert [lora["file"] for lora in merged.loras()] == [
        "a_HIGH_lora.safetensors", "style.safetensors", "low_noise_model.safetensors",
    ]  # fmt: skip
    assert sum("-noise transformer" in note for note in merged.notes) == 2
    weights = {"student": made.models().state("transformer"), SECOND: files.low()}
    for which, seeds in (("student", (0, 2)), (SECOND, (1, 2))):
        for seed in seeds:
            weights[which] = lora_files.random_lora(seed=seed).merged(weights[which])
        name = next(name for name, weight in source.module(which).named_parameters() if weight.ndim == 2)
        expected = weights[which][uncut(name, made.WAN.num_layers - made.SIZES["head_blocks"])]
        assert torch.allclose(merged.tensor(which, name), expected.float(), atol=1e-6)
