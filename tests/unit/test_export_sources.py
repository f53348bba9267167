"""Where weights come from: folders that are complete and belong together, and seeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.synthetic import tokenizer_bytes
from tests.unit.export_tools import VAE, WAN, small_source
from tmd_export import ExportError, FolderSource, sources
from tmd_export.parts import PARTS, ordered
from tmd_export.sources import open_source
from tmd_ref.checkpoint import save_model
from tmd_ref.student import TMDStudent, save_student
from tmd_ref.umt5 import UMT5Config, UMT5Encoder
from tmd_ref.vae import WanVAE, WanVAEConfig

TEXT = UMT5Config(vocab_size=64, dim=WAN.text_dim, num_heads=2, head_dim=8, ffn_dim=32, num_layers=1)


@pytest.fixture(scope="module")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    save_student(folder / "student.safetensors", TMDStudent(WAN, 1).half())
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
        source.graph(part)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_gives_every_graph_in_float32(folder: Path) -> None:
    source = FolderSource(folder, "small")
    source.check(PARTS)
    assert (source.wan, source.head_blocks, source.fusion, source.vae) == (WAN, 1, "gated", VAE)
    for part in PARTS:
        module = source.graph(part).module
        assert {weight.dtype for weight in module.parameters()} == {torch.float32}
        assert not module.training
    hashes = source.sha256(("text_encoder", "backbone", "flow_head"))
    assert set(hashes) == {"umt5.safetensors", "tokenizer.model", "student.safetensors"}
    assert source.origin == "checkpoint checkpoint"  # the folder's own name, not its path


def test_a_folder_without_a_student_is_told_what_belongs_there(folder: Path) -> None:
    (folder / "student.safetensors").unlink()
    message = refused(folder)
    assert "has no student.safetensors" in message and "vae.safetensors, umt5.safetensors, tokenizer.model" in message
    (folder / "Wan2.1_VAE.pth").touch()
    assert "Wan2.1_VAE.pth of an official release" in refused(folder)
    assert "is not a folder" in refused(folder / "nothing")


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
    def said(*arguments: object) -> str:
        with pytest.raises(ExportError) as caught:
            open_source(*arguments)
        return str(caught.value)

    assert "no built-in weights: give --checkpoint DIR" in said("wan1.3b")
    assert "there is no model 'huge'" in said("huge")
    assert "has dim 48, and tiny has 128: this is another model" in said("tiny", folder)
    assert "either --checkpoint or --random-weights" in said("tiny", folder, 0)
    monkeypatch.setattr(sources, "built_in_folder", lambda: folder / "nothing")
    assert "missing from this installation" in said("tiny")
    monkeypatch.setattr(sources, "built_in_folder", lambda: folder)
    assert open_source("tiny").origin == "built-in weights"


def test_random_weights_depend_on_the_seed_alone_and_no_weight_is_degenerate() -> None:
    first, again, other = (small_source(seed).graph("flow_head").module.state_dict() for seed in (3, 3, 4))
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert not torch.equal(weight, other[name]), name
        assert weight.numel() == 1 or weight.std() > 0, name


def test_a_part_has_the_same_random_weights_whatever_else_is_built() -> None:
    backbone, head = (small_source().graph(part).module for part in ("backbone", "flow_head"))
    shared = head.head
    assert torch.equal(shared.patch_embedding.weight, backbone.patch_embedding.weight)
    assert torch.equal(shared.time_embedding[0].weight, backbone.time_embedding[0].weight)
    assert not torch.equal(shared.interval_embedding[0].weight, backbone.time_embedding[0].weight)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gated", "concat"])
def test_outputs_with_random_weights_are_of_size_one(fusion: str) -> None:
    source = small_source(fusion=fusion)
    for part in PARTS:
        graph = source.graph(part)
        outputs = graph.module(*graph.random_inputs(0, batch=2, frames=3, height=4, width=6, text=5).values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for spec, output in zip(graph.outputs, outputs, strict=True):
            if output.dtype == torch.uint8:
                assert output.unique().numel() > 100
            elif output.any():  # the cache of a temporal upsampling is zero after the first frame
                assert 0.1 < output.std() < 10, (part, spec.name)


def test_wan_sizes_are_estimated_without_building_them_and_leave_the_text_encoder_out() -> None:
    source = open_source("wan1.3b", random_seed=0)
    assert source.default_parts == ("backbone", "flow_head", "decoder_first", "decoder_step")
    assert open_source("tiny", random_seed=0).default_parts == PARTS
    assert source.tokenizer is None
    assert 4.5e9 < source.estimated_bytes("backbone") < 5e9
    assert source.estimated_bytes("decoder_step") == 4 * 73_295_331
    assert source.estimated_bytes("text_encoder") == 4 * 5_680_910_336


def test_parts_come_in_the_order_of_a_run() -> None:
    assert ordered(["decoder_step", "backbone", "backbone"]) == ("backbone", "decoder_step")
    with pytest.raises(ValueError, match="no part is named"):
        ordered([])
