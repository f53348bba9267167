"""Checkpoints of Wan2.2-TI2V-5B: both layouts give the same weights, its sampling is its own, and it is not Wan2.1."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import lora_files
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tmd_export import WithLoras
from tmd_export.families import FAMILIES, sampling_of
from tmd_export.parts import PARTS, VIDEO_PARTS
from tmd_export.presets.wan import PRESETS
from tmd_export.sources.random_wan import RandomSource
from tmd_export.sources.wan import WanSource
from tmd_ref.distill.config import ConfigError, load_config
from tmd_ref.vae import WAN_VAE_CONFIGS

LAYOUTS: dict[str, Any] = {"diffusers": made.write_diffusers, "original": made.write_original}


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return LAYOUTS[request.param](tmp_path_factory.mktemp("layout") / "Wan2.2-TI2V-5B", wan22=True)


@pytest.fixture
def diffusers(tmp_path: Path) -> Path:
    """A folder in diffusers' layout, free to be changed."""
    return made.write_diffusers(tmp_path / "Wan2.2-TI2V-5B-Diffusers", wan22=True)


def small22(*paths: Path) -> WanSource:
    return small(*paths, **made.SIZES22)


def test_both_layouts_give_the_same_weights(folder: Path) -> None:
    source = small22(folder)
    source.check(PARTS)
    assert source.default_parts == PARTS and source.model_entry()["architecture"] == "wan2.2-ti2v"
    latents = source.latents_entry()
    assert (latents["channels"], latents["spatial_stride"], latents["mean"][0]) == (48, 16, -0.2289)
    for which, part in (("vae", "vae"), ("text_encoder", "text_encoder")):
        for name, weight in made.models(wan22=True).state(part).items():
            assert torch.equal(source.tensor(which, name).float(), weight), name
    original = made.models(wan22=True).state("transformer")
    assert torch.equal(source.tensor("student", "backbone.patch_embedding.weight"), original["patch_embedding.weight"])
    assert torch.equal(source.tensor("student", "head.head.head.weight"), original["head.head.weight"])


def test_sizes_and_the_vae_follow_from_the_tensors(folder: Path) -> None:
    source = WanSource([folder], text=made.TEXT)
    assert (source.wan.in_channels, source.wan.dim, source.model) == (48, 48, "wan-48x3")
    assert source.vae is WAN_VAE_CONFIGS["wan2.2"]
    assert "does not fit Wan's VAE" in refusal(lambda: source.check(VIDEO_PARTS))  # it is a small one


@pytest.mark.parametrize("file", ["transformer", "vae", "flat patches"])
def test_single_files_of_others_are_recognised(file: str, folder: Path, tmp_path: Path) -> None:
    """As ComfyUI has them (`wan2.2_ti2v_5B_fp16`, `wan2.2_vae`); as a training leaves them (Turbo's `model.pt`), here
    with the patch embedding as a matrix."""
    prefix = "" if file == "vae" else "model.diffusion_model."
    weights = made.models(wan22=True).state("vae" if file == "vae" else "transformer")
    if file == "flat patches":
        weights["patch_embedding.weight"] = weights["patch_embedding.weight"].flatten(1)
    state = {prefix + name: weight.half() for name, weight in weights.items()}
    wrapped = file == "flat patches"
    single = saved(tmp_path / f"file.{'pt' if wrapped else 'safetensors'}", {"generator": state} if wrapped else state)
    source = small22(single, folder)
    source.check(VIDEO_PARTS)
    assert source.model_entry()["architecture"] == "wan2.2-ti2v"
    assert any(path.endswith(single.name) for path in source.sha256(VIDEO_PARTS))


def test_it_is_sampled_as_itself(folder: Path) -> None:
    source = small22(folder)
    sampling = sampling_of(source)
    assert sampling.video == {"frames": 121, "width": 1280, "height": 704, "fps": 24}
    assert dict(sampling.sampler) == dict(PRESETS["wan2.2-ti2v"].sampler)
    assert "is of the architecture wan2.2-ti2v" in refusal(lambda: sampling_of(source, "wan"))
    assert sampling_of(source, "wan2.2-turbo").sampler["allowed_steps"] == [4]


def test_presets_of_it_are_refused_for_wan21(tmp_path: Path) -> None:
    source = small(made.write_original(tmp_path / "Wan2.1-T2V"))
    said = refusal(lambda: sampling_of(source, "fastwan2.2"))
    assert "is of the architecture wan2.1-t2v" in said and "wan2.2" not in said.partition("choose among")[2]


@pytest.mark.parametrize(("wan22", "preset"), [(True, "fastwan2.2"), (False, "fastwan-qad")])
def test_a_folder_of_fastvideo_is_sampled_as_its_pipeline_samples(wan22: bool, preset: str, tmp_path: Path) -> None:
    """Its scheduler says UniPC, which that pipeline ignores."""
    folder = made.write_diffusers(tmp_path / "FastWan", wan22=wan22)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "WanDMDPipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    source = small22(folder) if wan22 else small(folder)
    assert dict(sampling_of(source).sampler) == dict(PRESETS[preset].sampler)
    assert source.sampler_note is not None and "WanDMDPipeline" in source.sampler_note
    assert source.sampler_note == WithLoras(source, []).sampler_note


@pytest.mark.parametrize("wan22", [True, False])
def test_transformer_and_vae_of_different_latents_are_refused(wan22: bool, folder: Path, tmp_path: Path) -> None:
    other = saved(tmp_path / "vae.pth", made.models(not wan22).state("vae"))
    source = small22(other, folder) if wan22 else small(other, made.write_original(tmp_path / "Wan2.1-T2V"))
    have, want = (16, 48) if wan22 else (48, 16)
    said = refusal(lambda: source.check(VIDEO_PARTS))
    assert f"vae.pth has latents of width {have}, but the transformer makes latents of width {want}" in said


def test_a_model_that_is_told_a_picture_too_is_refused(diffusers: Path, tmp_path: Path) -> None:
    """Relatives of it: 48 channels of latents, and as many of something else beside them."""
    state = made.models(wan22=True).state("transformer")
    state |= {"patch_embedding.weight": torch.zeros(48, 100, 1, 2, 2)}
    said = refusal(lambda: WanSource([saved(tmp_path / "model.safetensors", state)]))
    assert "takes latents of 100 channels and makes latents of 48" in said


@pytest.mark.parametrize("entry", [("boundary_ratio", 0.9), ("transformer_2", ["diffusers", "WanTransformer3DModel"])])
def test_an_a14b_is_no_5b(entry: tuple[str, Any], diffusers: Path) -> None:
    index = json.loads((diffusers / "model_index.json").read_text()) | dict([entry])
    (diffusers / "model_index.json").write_text(json.dumps(index))
    assert "Wan2.2-A14B" in refusal(lambda: small22(diffusers))


def test_it_has_no_students_of_ours() -> None:
    """The training encodes with Wan2.1's VAE."""
    assert "wan2.2-ti2v-5b" in FAMILIES["wan"].models and "wan2.2-ti2v-5b" not in FAMILIES["tmd"].models
    with pytest.raises(ConfigError, match=r"wan2\.2-ti2v-5b.*: choose one of tiny, wan1\.3b, wan14b"):
        load_config("wan1.3b", ["model=wan2.2-ti2v-5b"])


def test_random_weights_have_its_vae() -> None:
    source = RandomSource("wan2.2-ti2v-5b", 0, fusion=None)
    assert source.family == "wan" and source.latents_entry()["channels"] == 48
    assert sum(weight.numel() for weight in source.module("student").parameters()) == 4_999_787_712


@pytest.mark.parametrize("rename", [None, lora_files.in_diffusers, lora_files.flat], ids=["wan", "diffusers", "kohya"])
def test_a_lora_is_merged_into_it(rename: Callable[[str], str] | None, folder: Path, tmp_path: Path) -> None:
    """Patch embedding and output layer too, whose shapes are those of 48 channels."""
    layers = [*lora_files.BLOCK_LAYERS, "patch_embedding", "head.head"]
    lora = lora_files.random_lora(layers, wan22=True)
    names = lora.tensors() if rename is None else lora.tensors(rename)
    if rename is lora_files.in_diffusers:
        names = {f"transformer.{name}": tensor for name, tensor in names.items()}
    source = WithLoras(small22(folder), [(saved(tmp_path / "lora.safetensors", names), 0.7)])
    assert source.parts == PARTS and source.model_entry()["first_frame"]
    expected = lora.merged(lora_files.weights(wan22=True), 0.7)
    for name in [name for name, _ in source.module("student").named_parameters()]:
        found = source.tensor("student", name).double()
        assert (found - expected[source.published_names(name)[0]]).abs().max() <= 2e-6, name


def test_a_lora_of_the_other_wan_is_refused_by_its_shapes(folder: Path, tmp_path: Path) -> None:
    lora = lora_files.random_lora(["patch_embedding"])
    path = saved(tmp_path / "lora.safetensors", lora.tensors())
    said = refusal(lambda: WithLoras(small22(folder), [(path, 1.0)]))
    assert "patch_embedding" in said
