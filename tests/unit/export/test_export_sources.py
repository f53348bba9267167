"""Where weights come from: folders that are complete and belong together, and seeds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.export_tools import VAE, WAN, small_source, with_weights
from tests.helpers.synthetic import tokenizer_bytes
from tmd_export import ExportError, FolderSource, open_source
from tmd_export.families.build import build
from tmd_export.parts import VIDEO_PARTS, ordered
from tmd_export.sources import source as sources
from tmd_ref.checkpoint import save_model
from tmd_ref.student import TimeGrids, TMDStudent, save_student
from tmd_ref.umt5 import UMT5Config, UMT5Encoder
from tmd_ref.vae import WanVAE, WanVAEConfig

TEXT = UMT5Config(vocab_size=64, dim=WAN.text_dim, num_heads=2, head_dim=8, ffn_dim=32, num_layers=1)


@pytest.fixture(scope="module")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_student(folder / "student.safetensors", TMDStudent(WAN, 1, grids=TimeGrids(5, 2, 3.0, 8.0)).half())
    save_model(folder / "vae.safetensors", WanVAE(VAE).half())
    save_model(folder / "umt5.safetensors", UMT5Encoder(TEXT).half())
    (folder / "tokenizer.model").write_bytes(tokenizer_bytes())
    return folder


@pytest.fixture
def folder(_original: Path, tmp_path: Path) -> Path:
    """A complete checkpoint in half precision, free to be damaged."""
    return Path(shutil.copytree(_original, tmp_path / "checkpoint"))


def refused(folder: Path, part: str = "backbone") -> str:
    with pytest.raises(ExportError) as caught:
        source = FolderSource(folder, "small")
        source.check((part,))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_gives_every_weight_as_it_is_stored(folder: Path) -> None:
    source = FolderSource(folder, "small")
    source.check(VIDEO_PARTS)
    assert (source.wan, source.head_blocks, source.fusion, source.vae) == (WAN, 1, "gated", VAE)
    distilled_for = {"steps": 5, "inner_steps": 2, "shift": 3.0, "inner_shift": 8.0, "allowed_steps": [1, 2, 3, 4, 5]}
    assert source.sampler is not None and distilled_for.items() <= source.sampler.items()
    for which, file in sources.FILE_OF.items():
        stored, module = load_file(folder / file), source.module(which)
        assert not module.training and all(weight.is_meta for weight in module.parameters())
        assert stored.keys() == {name for name, _ in module.named_parameters()}
        for name, weight in stored.items():
            assert weight.dtype == torch.float16 and torch.equal(source.tensor(which, name), weight)
    hashes = source.sha256(("text_encoder", "backbone", "flow_head"))
    assert set(hashes) == {"umt5.safetensors", "tokenizer.model", "student.safetensors"}
    assert source.origin == "checkpoint checkpoint"  # the folder's own name, not its path


def test_a_folder_without_a_student_is_told_what_belongs_there(folder: Path) -> None:
    (folder / "student.safetensors").unlink()
    message = refused(folder)
    assert "has no student.safetensors" in message
    with pytest.raises(ExportError, match="has nothing to make backbone from"):
        open_source("tiny", folder).check(("backbone",))
    for name in ("vae.safetensors", "umt5.safetensors"):
        (folder / name).unlink()
    with pytest.raises(ExportError, match=r"student\.safetensors and, for the other parts, vae\.safetensors"):
        open_source("tiny", folder)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("decoder_step", "vae.safetensors"),
        ("text_encoder", "umt5.safetensors"),
        ("text_encoder", "tokenizer.model"),
    ],
)
def test_a_missing_file_matters_only_to_its_own_parts(folder: Path, part: str, file: str) -> None:
    (folder / file).unlink()
    message = refused(folder, part)
    assert f"has no {file}, which {part} needs" in message and "backbone,flow_head" in message
    assert part not in message.partition("--parts")[2]
    FolderSource(folder, "small").check(("backbone", "flow_head"))


@pytest.mark.parametrize("file", ["student.safetensors", "vae.safetensors", "umt5.safetensors"])
def test_a_truncated_or_foreign_file_is_one_sentence(folder: Path, file: str) -> None:
    part = {"student": "backbone", "vae": "decoder_first", "umt5": "text_encoder"}[file.split(".")[0]]
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    assert f"{file} is not a complete safetensors file" in refused(folder, part)
    (folder / file).write_bytes(b"not weights")
    assert file in refused(folder, part)


def test_files_of_different_models_are_refused(folder: Path) -> None:
    save_model(folder / "umt5.safetensors", UMT5Encoder(UMT5Config(64, 32, 2, 8, 32, 1)))
    assert "umt5.safetensors has width 32, but the student reads text features of width 24" in refused(
        folder, "text_encoder"
    )
    save_model(folder / "umt5.safetensors", UMT5Encoder(UMT5Config(40, 24, 2, 8, 32, 1)))
    assert " words and umt5.safetensors 40" in refused(folder, "text_encoder")
    other = WanVAEConfig(dim=4, z_dim=8, dim_mult=(1, 1), num_res_blocks=0, temporal_downsample=(True,),
                         latents_mean=(0.0,) * 8, latents_std=(1.0,) * 8)  # fmt: skip
    save_model(folder / "vae.safetensors", WanVAE(other))
    assert "vae.safetensors has width 8, but the student makes latents of width 16" in refused(folder, "decoder_first")
    (folder / "tokenizer.model").write_bytes(b"")
    assert "tokenizer" in refused(folder, "text_encoder")


def test_open_source_tells_what_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: Any) -> str:
        with pytest.raises(ExportError) as caught:
            open_source(*arguments)
        return str(caught.value)

    assert "no built-in weights: give --checkpoint PATH" in said("wan1.3b")
    assert "there is no model 'huge'" in said("huge")
    assert "has dim 48, and tiny has 128: this is another model" in said("tiny", folder)
    assert "either --checkpoint or --random-weights" in said("tiny", folder, 0)
    monkeypatch.setattr(sources, "built_in_folder", lambda: folder / "nothing")
    assert "missing from this installation" in said("tiny")
    monkeypatch.setattr(sources, "built_in_folder", lambda: folder)
    assert open_source("tiny").origin == "built-in weights"


def test_random_weights_depend_on_the_seed_and_the_name_alone_and_none_is_degenerate() -> None:
    first, again, other = (small_source(seed) for seed in (3, 3, 4))
    seen = set()
    for name, _ in first.module("student").named_parameters():
        weight = first.tensor("student", name)
        assert torch.equal(weight, again.tensor("student", name)), name
        assert not torch.equal(weight, other.tensor("student", name)), name
        assert weight.numel() == 1 or weight.std() > 0, name
        seen.add(weight.flatten()[0].item())
    assert len(seen) > 80  # two weights of one shape differ


def test_what_two_graphs_share_is_one_weight_of_the_source() -> None:
    modules: list[Any] = [with_weights(small_source(), part).module for part in ("backbone", "flow_head")]
    backbone, head = modules
    shared = head.head
    assert torch.equal(shared.patch_embedding.weight, backbone.patch_embedding.weight)
    assert torch.equal(shared.time_embedding[0].weight, backbone.time_embedding[0].weight)
    assert not torch.equal(shared.interval_embedding[0].weight, backbone.time_embedding[0].weight)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_outputs_with_random_weights_are_of_size_one(fusion: str) -> None:
    source = small_source(fusion=fusion)
    for part in VIDEO_PARTS:
        graph = with_weights(source, part)
        outputs = graph.module(*graph.random_inputs(0, batch=2, frames=3, height=4, width=6, text=5).values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for spec, output in zip(graph.outputs, outputs, strict=True):
            if output.dtype == torch.uint8:
                assert output.unique().numel() > 100
            elif output.numel() == 1:
                assert 0.1 < output < 10, (part, spec.name)
            elif output.any():  # the cache of a temporal upsampling is zero after the first frame
                assert 0.1 < output.std() < 10, (part, spec.name)


def test_wan_sizes_are_estimated_without_building_them_and_leave_the_text_encoder_out() -> None:
    source = open_source("wan1.3b", random_seed=0)
    assert source.default_parts == ("backbone", "flow_head", "decoder_first", "decoder_step")
    assert open_source("tiny", random_seed=0).default_parts == VIDEO_PARTS
    assert source.tokenizer is None
    assert 4.5e9 < build(source, "backbone")[1].bytes() < 5e9
    assert build(source, "text_encoder")[1].bytes(as_float32=True) == 4 * 5_680_910_336
    assert 0.5 < build(source, "backbone", "bf16")[1].bytes() / build(source, "backbone")[1].bytes() < 0.52


def test_parts_come_in_the_order_of_a_run() -> None:
    assert ordered(["decoder_step", "backbone", "backbone"]) == ("backbone", "decoder_step")
    with pytest.raises(ValueError, match="no part is named"):
        ordered([])
