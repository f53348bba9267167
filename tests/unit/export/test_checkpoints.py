"""What `WanSource` accepts and refuses: prefixes, wrappers, mixtures; relatives of Wan2.1; damaged, hostile files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tests.helpers.synthetic import tokenizer_bytes
from tmd_export import open_source
from tmd_export.checkpoints import open_tensors
from tmd_export.parts import VIDEO_PARTS
from tmd_export.presets.tmd import student_sampler
from tmd_export.sources.wan import WanSource
from tmd_ref.checkpoint import save_model
from tmd_ref.split import SplitWan
from tmd_ref.student import TimeGrids, TMDStudent, save_student
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE
from tmd_ref.wan import WAN_CONFIGS, WanTransformer

State = dict[str, Any]


@pytest.fixture
def transformer() -> State:
    return made.models().state("transformer")


@pytest.fixture(scope="module")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_original(tmp_path_factory.mktemp("checkpoint") / "Wan2.1-T2V-small")


@pytest.fixture
def official(_original: Path, tmp_path: Path) -> Path:
    """A complete official folder, free to be damaged."""
    return Path(shutil.copytree(_original, tmp_path / "Wan2.1-T2V-small"))


def holds_the_transformer(source: WanSource) -> None:
    """Every weight is the one that was written, under the names of a transformer cut in two."""
    wan = WanTransformer(made.WAN)
    wan.load_state_dict(made.models().state("transformer"))
    for name, weight in SplitWan(wan, source.head_blocks).state_dict().items():
        found = source.tensor("student", name)
        assert found.shape == weight.shape and torch.equal(found, weight), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize(
    "prefix",
    ["", "net.", "model.", "model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod.",
     "model._fsdp_wrapped_module.", "transformer.", "pipe.dit.", "ema_model."],
)  # fmt: skip
def test_a_single_file_loads_with_every_prefix(prefix: str, suffix: str, transformer: State, tmp_path: Path) -> None:
    path = saved(tmp_path / f"model{suffix}", {prefix + name: weight for name, weight in transformer.items()})
    source = small(path)
    holds_the_transformer(source)
    assert source.default_parts == ("backbone", "flow_head")


def test_the_compiler_may_leave_its_mark_inside_of_names(transformer: State, tmp_path: Path) -> None:
    state = {name.replace("blocks.1.", "blocks.1._orig_mod."): weight for name, weight in transformer.items()}
    holds_the_transformer(small(saved(tmp_path / "model.pt", state)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"generator": state},
        lambda state: {"generator_ema": state, "generator": {name: 2 * w for name, w in state.items()}},
        lambda state: {"generator": {f"model.{name}": w for name, w in state.items()}, "critic": {"w": torch.ones(2)}},
        lambda state: {"model": {"state_dict": state}},
    ],
    ids=["generator", "averaged before generator", "beside a critic", "two deep"],
)
def test_dictionaries_around_the_weights_are_opened(wrap: Callable, transformer: State, tmp_path: Path) -> None:
    source = small(saved(tmp_path / "model.pt", wrap(transformer)))
    holds_the_transformer(source)
    assert any("are taken" in note for note in source.notes)


def test_autoregressive_checkpoints_cannot_be_told_and_the_note_says_so(transformer: State, tmp_path: Path) -> None:
    source = small(saved(tmp_path / "self_forcing.pt", {"generator_ema": transformer}))
    assert "autoregressive" in source.notes[-1]
    assert not any("autoregressive" in note for note in small(saved(tmp_path / "plain.pt", transformer)).notes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_as_rcm_writes_it(suffix: str, transformer: State, tmp_path: Path) -> None:
    """Patch embedding as a matrix, states of a library and counters among the weights, bfloat16."""
    state = {f"net.{name}": weight.bfloat16() for name, weight in transformer.items()}
    state["net.patch_embedding.weight"] = state["net.patch_embedding.weight"].flatten(1)
    state["net.blocks.0.self_attn.attn_op._extra_state"] = torch.zeros(4, dtype=torch.long)
    state["net.accum_video_sample_counter"] = torch.tensor(7)
    if suffix == ".pt":
        state["net.blocks.1.self_attn.attn_op._extra_state"] = None
    source = small(saved(tmp_path / f"rCM_Wan2.1_T2V{suffix}", state))
    weight = source.tensor("student", "backbone.patch_embedding.weight")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, transformer["patch_embedding.weight"].bfloat16())


def test_weights_are_mapped_and_the_file_stays_as_it_is(official: Path) -> None:
    source = small(official)
    for which, name in (("student", "head.head.head.weight"), ("vae", "conv2.weight")):
        before = source.tensor(which, name).clone()
        source.tensor(which, name).add_(1)  # copy on write: neither a crash nor a changed checkpoint
        assert torch.equal(source.tensor(which, name), before)


def test_a_tensor_may_be_a_view_of_a_larger_one(transformer: State, tmp_path: Path) -> None:
    transformer["text_embedding.0.weight"] = transformer["text_embedding.0.weight"].t().contiguous().t()
    both = torch.cat([transformer["blocks.0.ffn.0.bias"], transformer["blocks.1.ffn.0.bias"]])
    transformer["blocks.0.ffn.0.bias"], transformer["blocks.1.ffn.0.bias"] = both.chunk(2)
    holds_the_transformer(small(saved(tmp_path / "model.pth", transformer)))


# Mixtures of several checkpoints


@pytest.mark.parametrize("order", [1, -1], ids=["file first", "folder first"])
def test_a_file_of_its_own_replaces_that_part_of_a_folder(order: int, official: Path, tmp_path: Path) -> None:
    state = {name: weight + 1 for name, weight in made.models().state("transformer").items()}
    distilled = saved(tmp_path / "rCM.pt", state)
    source = small(*[distilled, official][::order])
    assert torch.equal(source.tensor("student", "backbone.text_embedding.0.bias"), state["text_embedding.0.bias"])
    source.check(VIDEO_PARTS)
    assert source.default_parts == VIDEO_PARTS
    assert "rCM.pt" in source.origin and official.name in source.origin
    assert set(source.sha256(VIDEO_PARTS)) == {
        "rCM.pt",
        f"{official.name}/models_t5_umt5-xxl-enc-bf16.pth",
        f"{official.name}/Wan2.1_VAE.pth",
        f"{official.name}/google/umt5-xxl/spiece.model",
    }


def test_the_same_part_twice_is_refused(official: Path, transformer: State, tmp_path: Path) -> None:
    said = refusal(lambda: small(official, Path(shutil.copytree(official, tmp_path / "other"))))
    assert "both hold Wan's transformer" in said and "--checkpoint of its own" in said
    one, two = saved(tmp_path / "1.pt", transformer), saved(tmp_path / "2.safetensors", transformer)
    assert "1.pt both hold" in refusal(lambda: small(one, two))


def test_every_part_can_come_as_a_file(official: Path, tmp_path: Path) -> None:
    source = small(
        official / "diffusion_pytorch_model.safetensors",
        official / "models_t5_umt5-xxl-enc-bf16.pth",
        official / "Wan2.1_VAE.pth",
        official / "google" / "umt5-xxl" / "spiece.model",
    )
    source.check(VIDEO_PARTS)
    only_vae = small(official / "Wan2.1_VAE.pth")
    assert only_vae.default_parts == ("decoder_first", "decoder_step")
    only_vae.check(only_vae.default_parts)
    only_transformer = small(official / "diffusion_pytorch_model.safetensors")
    assert "Wan2.1_VAE.pth" in (said := refusal(lambda: only_transformer.check(VIDEO_PARTS[1:])))
    assert "--parts backbone,flow_head" in said


def test_a_text_encoder_without_its_tokenizer_is_refused(official: Path) -> None:
    (official / "google" / "umt5-xxl" / "spiece.model").unlink()
    said = refusal(lambda: small(official).check(("text_encoder",)))
    assert "spiece.model (a tokenizer.json alone is not read" in said
    small(official).check(VIDEO_PARTS[1:])


@pytest.mark.parametrize("head_blocks", [1, 2])
def test_a_student_of_our_own_joins_an_official_folder(head_blocks: int, official: Path, tmp_path: Path) -> None:
    student = TMDStudent(made.WAN, head_blocks, "concat", grids=TimeGrids(1, 4, 5.0, 6.0))
    save_student(tmp_path / "student.safetensors", student)
    source = small(tmp_path / "student.safetensors", official)
    assert (source.family, source.head_blocks, source.fusion) == ("tmd", head_blocks, "concat")
    assert source.sampler == student_sampler(student.grids)
    source.check(VIDEO_PARTS)
    for name, weight in student.state_dict().items():
        assert torch.equal(source.tensor("student", name), weight), name
    other = WanTransformer(WAN_CONFIGS["tiny"])
    save_student(tmp_path / "student.safetensors", TMDStudent(WAN_CONFIGS["tiny"], 2, wan=other))
    assert "has dim 128, and small has 48" in refusal(lambda: small(tmp_path / "student.safetensors"))


def test_the_files_of_tmd_distill_load_one_by_one_with_their_own_sizes(tmp_path: Path) -> None:
    save_model(tmp_path / "vae.safetensors", made.models().vae)
    save_model(tmp_path / "umt5.safetensors", made.models().text_encoder)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_bytes())
    source = small(tmp_path, vae=None, text=None)
    assert (source.vae, source.text) == (made.VAE, made.TEXT)
    source.check(("text_encoder", "decoder_first"))


def test_open_source_reads_what_is_published(official: Path, tmp_path: Path) -> None:
    said = refusal(lambda: open_source("wan1.3b", official))
    assert "a Wan transformer of another size (width 48, 3 blocks), and wan1.3b has width 1536, 30 blocks" in said
    assert f"there is no {tmp_path / 'no'}" in refusal(lambda: open_source("wan1.3b", [tmp_path / "no"]))


# Full size, without the bytes


def test_a_checkpoint_of_full_size_opens_at_once_and_names_the_other_model(tmp_path: Path) -> None:
    """Real names, shapes and sizes (57 GB in six shards and an index; 5.7 GB in one file) as holes on the disk."""
    folders = {}
    for model, shards in (("wan1.3b", 1), ("wan14b", 6)):
        folder = folders[model] = tmp_path / model
        folder.mkdir()
        with torch.device("meta"):
            wan, vae = WanTransformer(WAN_CONFIGS[model]), WanVAE(WAN_VAE_CONFIGS["wan2.1"])
        shapes = {name: tuple(weight.shape) for name, weight in wan.state_dict().items()}
        stem = "diffusion_pytorch_model"
        names = [f"{stem}-{k + 1:05}-of-{shards:05}.safetensors" for k in range(shards)]
        names = names if shards > 1 else [f"{stem}.safetensors"]
        home = {name: names[k * shards // len(shapes)] for k, name in enumerate(shapes)}
        for file in names:
            made.write_hollow(folder / file, {name: shapes[name] for name in shapes if home[name] == file})
        if shards > 1:
            (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": home}))
        made.write_hollow(folder / "Wan2.1_VAE.safetensors", {n: tuple(w.shape) for n, w in vae.state_dict().items()})
    assert sum(file.stat().st_size for file in folders["wan14b"].glob("diff*.safetensors")) > 57e9
    with torch.device("meta"):
        encoder = UMT5Encoder(UMT5_CONFIGS["umt5-xxl"])
    text = made.write_hollow(
        tmp_path / "umt5.safetensors", {n: tuple(w.shape) for n, w in encoder.state_dict().items()}, "BF16"
    )
    (folders["wan14b"] / "spiece.model").write_bytes(tokenizer_bytes())
    source = open_source("wan14b", [folders["wan14b"], text])
    source.check(VIDEO_PARTS)
    assert source.tensor("student", "head.blocks.4.ffn.0.weight").shape == (13824, 5120)
    assert source.tensor("text_encoder", "token_embedding.weight").shape == (256_384, 4096)
    for model, other in (("wan1.3b", "wan14b"), ("wan14b", "wan1.3b")):
        said = refusal(lambda: open_source(model, folders[other]))  # noqa: B023
        assert f"that of {other}" in said and f"and {model} has width" in said and f"--model {other}" in said


def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    """Linux refuses to map such a file as a whole, which torch and safetensors would do: 14B in bfloat16 on 16 GB."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    shapes = {name: tuple(weight.shape) for name, weight in made.models().state("transformer").items()}
    more = {f"more.{k}": (memory // 16,) for k in range(8)}  # a quarter of the memory each, twice the memory together
    path = made.write_hollow(tmp_path / "huge.safetensors", {**more, **shapes})
    assert "8 unexpected ('more.0'" in refusal(lambda: small(path))
    tensors = open_tensors([path])
    assert tensors.read("more.7")[-3:].tolist() == [0, 0, 0]
    assert not tensors.read("head.modulation").any()


# Relatives that are no plain text-to-video model


@pytest.mark.parametrize(("key", "value", "family"), made.RELATIVES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_relatives_are_refused_by_family_and_key(
    key: str, value: Tensor, family: str, prefix: str, transformer: State, tmp_path: Path
) -> None:
    state = {prefix + name: weight for name, weight in {**transformer, key: value}.items()}
    said = refusal(lambda: small(saved(tmp_path / "model.safetensors", state)))
    assert family in said and repr(key) in said and "model.safetensors is" in said


def test_a_file_of_something_else_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    path = saved(tmp_path / "model.safetensors", {"unet.conv_in.weight": torch.zeros(2, 2)})
    assert "holds no part of a Wan model: its 1 tensors are called 'unet.conv_in.weight'" in refusal(
        lambda: small(path)
    )


def test_all_that_is_wrong_is_listed_at_once_and_not_endlessly(transformer: State, tmp_path: Path) -> None:
    for name in [name for name in transformer if name.startswith("blocks.1.")][:20]:
        del transformer[name]
    transformer["blocks.0.ffn.0.weight"] = torch.zeros(5, 7)
    transformer["blocks.2.norm3.bias"] = torch.zeros(48, dtype=torch.int32)
    transformer["head.head.gain"] = torch.zeros(2, 2)
    said = refusal(lambda: small(saved(tmp_path / "model.safetensors", transformer)))
    assert "20 missing ('blocks.1." in said and "and 14 more" in said
    assert "1 unexpected ('head.head.gain')" in said
    assert "2 of another shape or type ('blocks.0.ffn.0.weight' is [5, 7] instead of [96, 48]" in said
    assert "'blocks.2.norm3.bias' is int32 instead of float32 or float16 or bfloat16" in said


def test_a_name_under_two_prefixes_is_refused(transformer: State, tmp_path: Path) -> None:
    transformer["net.blocks.0.ffn.0.bias"] = transformer["blocks.0.ffn.0.bias"] + 1
    assert "holds 'blocks.0.ffn.0.bias' twice" in refusal(lambda: small(saved(tmp_path / "m.pt", transformer)))


def test_damage_in_one_part_is_told_when_that_part_is_wanted(official: Path) -> None:
    vae = made.models().state("vae")
    del vae["decoder.middle.1.proj.bias"]
    torch.save(vae, official / "Wan2.1_VAE.pth")
    source = small(official)
    source.check(("text_encoder", "backbone", "flow_head"))
    said = refusal(lambda: source.check(("decoder_step",)))
    assert "Wan2.1_VAE.pth does not fit Wan's VAE" in said and "1 missing ('decoder.middle.1.proj.bias')" in said
    shutil.copy(official / "models_t5_umt5-xxl-enc-bf16.pth", official / "Wan2.1_VAE.pth")
    said = refusal(lambda: small(official).check(("decoder_step",)))
    assert "Wan2.1_VAE.pth holds UMT5's encoder, and by its name it should hold Wan's VAE" in said
