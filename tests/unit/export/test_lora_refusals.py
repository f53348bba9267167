"""LoRA files that are not merged: for another model, of another kind, damaged or hostile, and what is said of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers import lora_files as files
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import refusal, saved, small
from tmd_export import RandomSource, WithLoras

State = dict[str, Tensor]
Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "wan.safetensors", files.weights())


@pytest.fixture
def refused(checkpoint: Path, tmp_path: Path) -> Callable[..., str]:
    def say(state: Any, name: str = "lora.safetensors") -> str:
        path = saved(tmp_path / name, state)
        said = refusal(lambda: WithLoras(small(checkpoint), [(path, 0.0)]))  # strength 0 does not make it right
        assert str(path) in said
        return said

    return say


def test_a_lora_of_which_some_layers_hit_nothing_is_refused_with_their_list(refused: Callable[..., str]) -> None:
    state = files.random_lora().tensors()
    extra = {f"diffusion_model.blocks.{n}.self_attn.q.lora_{side}.weight": torch.zeros(4, 4)
             for n in range(3, 11) for side in ("up", "down")}  # fmt: skip
    said = refused({**state, **extra})
    assert "does not fit small. Of its 38 layers: 'diffusion_model.blocks.10.self_attn.q' hits nothing" in said
    assert "and 2 more" in said and "with at least 11 blocks, and small has width 48, 3 blocks" in said


def test_a_lora_for_another_size_names_both_sizes(tmp_path: Path) -> None:
    rank, state = 2, {}
    for block in range(40):
        for part in "qkvo":
            layer = f"diffusion_model.blocks.{block}.self_attn.{part}"
            state[f"{layer}.lora_up.weight"], state[f"{layer}.lora_down.weight"] = (
                torch.zeros(5120, rank), torch.zeros(rank, 5120)
            )  # fmt: skip
    path = saved(tmp_path / "lora.safetensors", {name: weight.bfloat16() for name, weight in state.items()})
    said = refusal(lambda: WithLoras(RandomSource("wan1.3b", 0, fusion=None), [(path, 1.0)]))
    assert "'diffusion_model.blocks.0.self_attn.k' is [5120, 5120] instead of [1536, 1536]" in said
    assert "a model of width 5120 with at least 40 blocks, and wan1.3b has width 1536, 30 blocks" in said


def test_a_lora_of_something_else_says_what_it_calls_its_layers(refused: Callable[..., str]) -> None:
    state = {
        f"transformer.single_transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"
    }
    said = refused(state)
    assert "hits none of the tensors of small: its 1 layers are called 'transformer.single_transformer_blocks.0" in said


@pytest.mark.parametrize(
    "extra",
    [
        {"cross_attn.k_img.lora_up.weight": (48, 2), "cross_attn.k_img.lora_down.weight": (2, 48)},
        {"cross_attn.v_img.diff_b": (48,)},
    ],
)
def test_a_lora_for_image_to_video_is_told_by_its_layers(extra: dict[str, Any], refused: Callable[..., str]) -> None:
    more = {f"diffusion_model.blocks.0.{name}": torch.zeros(shape) for name, shape in extra.items()}
    said = refused({**files.random_lora().tensors(), **more})
    assert "_img' hits nothing. It is for an image-to-video model ('diffusion_model.blocks.0.cross_attn." in said


def test_a_lora_for_36_channels_is_told_by_its_patches(refused: Callable[..., str]) -> None:
    said = refused(
        {**files.random_lora().tensors(), "diffusion_model.patch_embedding.diff": torch.zeros(48, 36, 1, 2, 2)}
    )
    assert "'diffusion_model.patch_embedding.diff' is [48, 36, 1, 2, 2] instead of [48, 16, 1, 2, 2]" in said
    assert "It is for an image-to-video model ('patch_embedding.weight' takes 36 channels)" in said


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dora_scale", "a DoRA"),
        ("lora_magnitude_vector.weight", "a DoRA"),
        ("hada_w1_a", "a LoHa"),
        ("lokr_w2", "a LoKr"),
        ("oft_blocks", "an OFT"),
        ("lora_mid.weight", "a LoCon"),
        ("lora_embedding_A", "a LoRA of an embedding table"),
    ],
)
def test_other_kinds_are_refused_by_name(name: str, kind: str, refused: Callable[..., str]) -> None:
    said = refused({**files.random_lora().tensors(), f"{Q}.{name}": torch.zeros(4, 4)})
    assert kind in said and f"({f'{Q}.{name}'!r} is in it)" in said


def without(name: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        del state[f"{Q}.{name}"]

    return change


def with_tensor(name: str, value: Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


DAMAGED: list[tuple[Callable[[State], None], str]] = [
    (without("lora_up.weight"), f"'{Q}' has alpha and down alone"),
    (without("lora_down.weight"), f"'{Q}' has alpha and up alone"),
    (with_tensor(f"{Q}.lora_up.weight", torch.zeros(48, 5)), "has up [48, 5] and down [4, 48], which cannot be"),
    (with_tensor(f"{Q}.lora_up.weight", torch.zeros(96, 4)), "is [96, 48] instead of [48, 48]"),
    (with_tensor(f"{Q}.lora_up.weight", torch.zeros(48, 4, 2)), "which cannot be multiplied"),
    (with_tensor(f"{Q}.lora_down.weight", torch.zeros(4)), "which cannot be multiplied"),
    (with_tensor(f"{Q}.lora_down.weight", torch.zeros(4, 48, dtype=torch.int8)), "is int8 instead of float64 or"),
    (with_tensor(f"{Q}.alpha", torch.tensor(float("nan"))), "self_attn.q.alpha' of"),
    (with_tensor(f"{Q}.alpha", torch.ones(2)), "is not one number"),
    (with_tensor(f"{Q}.diff_b", torch.zeros(47)), f"'{Q}.diff_b' is [47] instead of [48]"),
    (with_tensor("diffusion_model.blocks.0.modulation.diff_b", torch.zeros(48)), "modulation.diff_b' hits nothing"),
    (with_tensor("diffusion_model.blocks.0.norm3.lora_up.weight", torch.zeros(48, 1)), "norm3' has up alone"),
    (with_tensor("transformer.blocks.0.attn1.to_q.diff", torch.zeros(48, 48)), "is the same layer as"),
    (with_tensor(f"{Q}.lora_up.other.weight", torch.zeros(48, 4)), "two of the same"),
    (with_tensor("blocks.0.self_attn.q.weight", torch.zeros(48, 48)), "1 tensors beside its LoRA that would be lost"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGED, ids=[words for _, words in DAMAGED])
def test_what_is_wrong_in_a_file_is_named(
    damage: Callable[[State], None], words: str, refused: Callable[..., str]
) -> None:
    state = files.random_lora().tensors()
    damage(state)
    assert words in refused(state)


def test_a_whole_model_is_no_lora(refused: Callable[..., str]) -> None:
    said = refused(files.weights())
    assert "holds no LoRA: its 96 tensors are called" in said and "a whole model is a --checkpoint" in said


def test_a_lora_is_no_checkpoint_and_the_message_names_the_option(tmp_path: Path) -> None:
    path = saved(tmp_path / "lora.safetensors", files.random_lora().tensors())
    said = refusal(lambda: small(path))
    assert "is a LoRA" in said and "give it as --lora, beside the --checkpoint of that model" in said


def test_a_stretched_matrix_cannot_claim_an_endless_rank(refused: Callable[..., str]) -> None:
    """In a pickle, one stored number can stand for any shape."""
    one, rank = torch.zeros(1), 1 << 40
    state = {f"{Q}.lora_up.weight": one.expand(48, rank), f"{Q}.lora_down.weight": one.expand(rank, 48)}
    assert f"has rank {1 << 40}, more than its weight of [48, 48]" in refused(state, "lora.pt")


def test_a_pickle_with_a_program_in_it_is_refused(refused: Callable[..., str]) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return print, ("ran",)

    assert "could run a program" in refused({"a": Program()}, "lora.pt")


def test_values_that_are_not_finite_are_refused_when_they_are_added(checkpoint: Path, tmp_path: Path) -> None:
    state = files.random_lora().tensors()
    state[f"{Q}.lora_up.weight"][3, 1] = float("inf")
    source = WithLoras(small(checkpoint), [(saved(tmp_path / "lora.safetensors", state), 1.0)])
    said = refusal(lambda: source.tensor("student", "backbone.blocks.0.self_attn.q.weight"))
    assert "'blocks.0.self_attn.q.weight' has values that are not finite after" in said


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.safetensors", "there is no file"),
        ("", "is a folder without adapter_model.safetensors or"),
        ("notes.txt", "is no file of weights"),
        ("cut.safetensors", "is not a complete safetensors file"),
    ],
)
def test_a_path_that_leads_to_no_lora_is_said(path: str, words: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("=")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert words in refusal(lambda: WithLoras(small(checkpoint), [(tmp_path / path, 1.0)]))


def test_more_loras_than_a_manifest_holds_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "lora.safetensors", files.random_lora(["blocks.0.ffn.0"]).tensors())
    WithLoras(small(checkpoint), [(path, 0.1)] * 64)
    assert "65 LoRAs were given" in refusal(lambda: WithLoras(small(checkpoint), [(path, 0.1)] * 65))


CONFIGS = [
    ({"peft_type": "LOHA", "lora_alpha": 4}, "is of the kind 'LOHA'"),
    ({"use_dora": True, "lora_alpha": 4}, "is a DoRA"),
    ({"lora_alpha": "4"}, "has '4' as an alpha"),
    ({"lora_alpha": 10**400}, "as an alpha"),
    ({}, "has 'None' as an alpha"),
    ({"lora_alpha": 4, "alpha_pattern": {"(a+)+": 2}}, "states alphas for patterns of layers"),
    ({"lora_alpha": 4, "alpha_pattern": {"q": None}}, "has 'None' as an alpha"),
    ({"lora_alpha": 4, "alpha_pattern": [1]}, "states alphas for patterns of layers"),
    ([4], "a list in JSON"),
]


@pytest.mark.parametrize("diffusers", [False, True])
@pytest.mark.parametrize(("config", "words"), CONFIGS, ids=[words for _, words in CONFIGS])
def test_a_configuration_that_cannot_be_followed_is_refused(
    config: Any, words: str, diffusers: bool, checkpoint: Path, tmp_path: Path
) -> None:
    state, path = files.random_lora(alpha=None).tensors(suffixes=(".lora_B.weight", ".lora_A.weight")), tmp_path
    if diffusers:
        path = tmp_path / "lora.safetensors"
        save_file(state, path, {"lora_adapter_metadata": json.dumps(config)})
    else:
        save_file(state, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert words in refusal(lambda: WithLoras(small(checkpoint), [(path, 1.0)]))


def test_a_configuration_that_is_no_json_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    save_file(files.random_lora().tensors(), tmp_path / "adapter_model.safetensors")
    for text in ("{", "[" * 100_000, "\x00"):
        (tmp_path / "adapter_config.json").write_text(text)
        assert "cannot be read as JSON" in refusal(lambda: WithLoras(small(checkpoint), [(tmp_path, 1.0)]))
    (tmp_path / "adapter_config.json").write_bytes(b" " * ((1 << 20) + 1))
    assert "is larger than 1 MiB" in refusal(lambda: WithLoras(small(checkpoint), [(tmp_path, 1.0)]))


def test_a_configuration_counts_in_the_provenance(checkpoint: Path, tmp_path: Path) -> None:
    """The scale comes from it, so a calibration is bound to it too."""
    save_file(files.random_lora(alpha=None).tensors(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    source = WithLoras(small(checkpoint), [(tmp_path, 1.0)])
    assert source.loras()[0]["file"] == f"{tmp_path.name}/adapter_model.safetensors"
    assert f"{tmp_path.name}/adapter_config.json" in source.sha256(("backbone",))
    assert made.WAN.dim == 48 and source.notes == ()
