"""A merged LoRA is what PEFT's merge and diffusers' loading and fusing make of the same file."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers import lora_files as files
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.checkpoint_files import saved, small
from tests.helpers.tim_models import TEXT, network
from tmd_export import WithLoras
from tmd_export.checkpoints.names import converted
from tmd_export.sources.source import Source
from tmd_export.sources.tim import RandomTiM
from tmd_ref.wan import WanTransformer

peft = pytest.importorskip("peft", reason="the merge is compared with PEFT's: pip install '.[test]'")
diffusers = pytest.importorskip("diffusers")

TOLERANCE = 1e-6  # both sum in float32, in another order
LINEARS = r"(.*\.([qkvo]|ffn\.[02]))|(text|time)_embedding\.[02]|time_projection\.1|head\.head"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("checkpoint") / "wan.safetensors", files.weights())


def merged(checkpoint: Path, *loras: tuple[Path, float]) -> dict[str, Tensor]:
    """Every weight of the transformer as the export reads it, by its original name."""
    return gathered(WithLoras(small(checkpoint), loras))


def gathered(source: Source) -> dict[str, Tensor]:
    names = [name for name, _ in source.module("student").named_parameters()]
    return {source.published_names(name)[0]: source.tensor("student", name) for name in names}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], base: dict[str, Tensor]) -> None:
    assert set(found) == set(expected) == set(base)
    changed = 0
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() <= TOLERANCE, name
        changed += not torch.equal(weight, base[name])
    assert changed > 5


def wan() -> nn.Module:
    model = WanTransformer(made.WAN)
    model.load_state_dict(files.weights())
    return model


def tuned(model: nn.Module, **config: Any) -> Any:
    """`model` with a LoRA of PEFT in it, every matrix random."""
    torch.manual_seed(3)
    found = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, weight in found.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.3)
    return found


def scaled(model: Any, strength: float) -> Any:
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(strength)
    return model


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha is not the rank": {"r": 4, "lora_alpha": 10, "target_modules": LINEARS},
    "a convolution": {"r": 3, "lora_alpha": 3, "target_modules": rf"{LINEARS}|patch_embedding"},
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": LINEARS},
    "a bias of up": {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": LINEARS},
    "layers with a rank and an alpha of their own": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": LINEARS,
        "rank_pattern": {"self_attn.q": 2, "blocks.1.ffn.0": 8},
        "alpha_pattern": {"self_attn.q": 7, "blocks.1.ffn.2": 1},
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_that_peft_saved_gives_what_peft_merges(
    config: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    model = tuned(wan(), **config)
    model.save_pretrained(tmp_path / "lora")
    found = merged(checkpoint, (tmp_path / "lora", -0.35))
    assert_equal(found, scaled(model, -0.35).merge_and_unload().state_dict(), files.weights())


def test_the_raw_state_of_peft_says_no_alpha_and_counts_in_full(checkpoint: Path, tmp_path: Path) -> None:
    """Names as `base_model.model.blocks.0.self_attn.q.lora_A.default.weight`: what training programs save by hand."""
    model = tuned(wan(), r=4, lora_alpha=8, target_modules=LINEARS)
    state = {name: weight for name, weight in model.state_dict().items() if "lora_" in name}
    assert "base_model.model.blocks.0.self_attn.q.lora_A.default.weight" in state
    torch.save(state, tmp_path / "lora.pt")
    found = merged(checkpoint, (tmp_path / "lora.pt", 2.0))
    assert_equal(found, model.merge_and_unload().state_dict(), files.weights())


def test_two_loras_of_peft_add_up(checkpoint: Path, tmp_path: Path) -> None:
    model, folders = wan(), [tmp_path / "a", tmp_path / "b"]
    for folder, rank in zip(folders, (2, 5), strict=True):
        one = tuned(model, r=rank, lora_alpha=4, target_modules=LINEARS)
        one.save_pretrained(folder)
        model = scaled(one, 0.5).merge_and_unload()
    found = merged(checkpoint, *((folder, 0.5) for folder in folders))
    assert_equal(found, model.state_dict(), files.weights())


def test_a_lora_of_a_transition_model_gives_what_peft_merges(tmp_path: Path) -> None:
    """Rank 16 on what a trainer of TiM would name, in the graph of the prompt and in that of the transition."""
    source = RandomTiM("tim-small", 0, TEXT)
    base = {name: weight.clone() for name, weight in network(source).state_dict().items()}
    layers = r".*\.(qkv|qkv_d|q|kv|proj|fc1_g|fc1_x|fc2|linear)|[td]\w+_embedder\.mlp\.[02]"
    model = tuned(network(source), r=16, lora_alpha=32, target_modules=layers)
    model.save_pretrained(tmp_path / "lora")
    found = gathered(WithLoras(source, [(tmp_path / "lora", 1.0)]))
    expected = model.merge_and_unload().state_dict()
    assert all((found[f"blocks.0.cross_attn.{name}.weight"] - base[f"blocks.0.cross_attn.{name}.weight"]).any()
               for name in ("q", "kv"))  # fmt: skip
    assert_equal(found, expected, base)


def fused(path: Path, strength: float) -> dict[str, Tensor]:
    """The transformer after diffusers has loaded and fused `path`, by the original names."""
    transformer = copy.deepcopy(made.models().theirs["transformer"])
    pipe = diffusers.WanPipeline(None, None, None, None, transformer=transformer)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(components=["transformer"], lora_scale=strength)
    pipe.unload_lora_weights()
    state = transformer.state_dict()
    return {name: state[converted("transformer", name)] for name in files.weights()}


ALL = [*files.BLOCK_LAYERS, *files.EMBEDDINGS, "time_projection.1"]
BIASES = (*files.BLOCK_LAYERS, *files.EMBEDDINGS, "time_projection.1")
LAYOUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "lightx2v": lambda: files.random_lora(ALL, None).tensors(),
    "with an alpha per layer": lambda: files.random_lora().tensors(),
    "with biases and the head's whole difference": lambda: files.random_lora(
        ALL, None, diff=("head.head",), diff_b=(*BIASES, "head.head")
    ).tensors(),
    "lora_A and lora_B": lambda: files.random_lora(ALL, None).tensors(suffixes=(".lora_B.weight", ".lora_A.weight")),
    "musubi": lambda: files.random_lora().tensors(files.flat),
    "diffusers": lambda: files.random_lora(ALL, None).tensors(
        lambda layer: f"transformer.{files.in_diffusers(layer)}", (".lora_B.weight", ".lora_A.weight")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_published_layout_gives_what_diffusers_fuses(
    layout: Callable[[], dict[str, Tensor]], checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(layout(), path)
    assert_equal(merged(checkpoint, (path, 0.125)), fused(path, 0.125), files.weights())


@pytest.mark.parametrize("metadata", [False, True])
def test_a_file_that_diffusers_saved_gives_what_diffusers_fuses(
    metadata: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """With its metadata, which state alpha and rank, and without, as most are published."""
    transformer = copy.deepcopy(made.models().theirs["transformer"])
    config = peft.LoraConfig(r=4, lora_alpha=9, target_modules=["to_q", "to_v", "to_out.0", "ffn.net.2"])
    transformer.add_adapter(config)
    for name, weight in transformer.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.3)
    state = peft.get_peft_model_state_dict(transformer)
    stated = diffusers.training_utils._collate_lora_metadata({"transformer": transformer}) if metadata else {}
    diffusers.WanPipeline.save_lora_weights(tmp_path, transformer_lora_layers=state, **stated)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    found = merged(checkpoint, (tmp_path, 0.8))
    expected = fused(path, 0.8)
    assert_equal(found, expected, files.weights())
    again = gathered(small(checkpoint))["blocks.0.self_attn.q.weight"]
    delta = found["blocks.0.self_attn.q.weight"] - again
    product = state["blocks.0.attn1.to_q.lora_B.weight"] @ state["blocks.0.attn1.to_q.lora_A.weight"]
    assert (delta - 0.8 * (9 / 4 if metadata else 1) * product).abs().max() <= TOLERANCE
