"""Every published layout, read by us and by diffusers and transformers: the same weights, the same outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import synthetic_checkpoints as made
from tmd_export.checkpoints.names import converted
from tmd_export.parts import VIDEO_PARTS
from tmd_export.sources.wan import WanSource
from tmd_ref.umt5 import UMT5_CONFIGS, UMT5Encoder
from tmd_ref.vae import WAN_VAE_CONFIGS, WanVAE
from tmd_ref.wan import WAN_CONFIGS, WanTransformer

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
LAYOUTS = {
    "original": made.write_original,
    "original, six shards": lambda folder: made.write_original(folder, shards=6),
    "diffusers": made.write_diffusers,
}


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request, tmp_path_factory):
    return LAYOUTS[request.param](tmp_path_factory.mktemp("checkpoint") / "Wan2.1-T2V-small")


def loaded(source: WanSource, which: str) -> torch.nn.Module:
    """`module(which)` with all its weights, in float32 as the exporter would have it."""
    module = source.module(which)
    assert all(weight.is_meta for weight in module.parameters())
    state = {name: source.tensor(which, name).float() for name in module.state_dict()}
    module.load_state_dict(state, strict=True, assign=True)
    return module


@torch.no_grad()
def test_a_folder_gives_the_velocity_of_diffusers_reading_the_same_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = WanSource([folder], "small", **made.SIZES)
    source.check(VIDEO_PARTS)
    assert (source.family, source.fusion, source.head_blocks, source.default_parts) == ("wan", None, 1, VIDEO_PARTS)
    if (folder / "transformer").is_dir():
        # A list of modules to keep in float32 makes diffusers ask for another library, and here all of them are.
        monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)
        theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    else:
        theirs = _convert_transformer(folder)
    x, t = torch.randn(2, 16, 3, 4, 6), torch.rand(2)
    prompt_embeds = torch.randn(2, made.WAN.text_len, made.WAN.text_dim)
    velocity = loaded(source, "student")(x, t, prompt_embeds)
    expected = theirs.eval()(x, 1000 * t, prompt_embeds, return_dict=False)[0]
    assert 0.3 < expected.std() < 3
    assert (velocity - expected).abs().max() <= TOLERANCE


def _convert_transformer(folder: Path) -> torch.nn.Module:
    """Diffusers' own converter of original checkpoints on what lies in the files."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
    from safetensors.torch import load_file

    state = {k: v for file in sorted(folder.glob("diffusion_*.safetensors")) for k, v in load_file(file).items()}
    theirs = diffusers.WanTransformer3DModel(**made.transformer_config())
    theirs.load_state_dict(convert_wan_transformer_to_diffusers(state), strict=True)
    return theirs


@torch.no_grad()
def test_a_folder_gives_the_video_of_diffusers_reading_the_same_files(folder: Path) -> None:
    if (folder / "vae").is_dir():
        theirs = diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    else:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        theirs = diffusers.AutoencoderKLWan(**made.vae_config())
        state = torch.load(folder / "Wan2.1_VAE.pth", weights_only=True)
        theirs.load_state_dict(convert_wan_vae_to_diffusers(state), strict=True)
    vae: Any = loaded(WanSource([folder], "small", **made.SIZES), "vae")
    latents = torch.randn(1, 16, 2, 3, 2)
    expected = theirs.eval().decode(vae.denormalise(latents)).sample
    assert expected.std() > 0.2 and (expected.abs() < 1).float().mean() > 0.3
    assert (vae.decode(latents) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_a_folder_gives_the_embeddings_of_transformers_reading_the_same_files(folder: Path) -> None:
    if (folder / "text_encoder").is_dir():
        theirs = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder")
    else:
        stored = torch.load(folder / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)
        state = {converted("text_encoder", name): weight.float() for name, weight in stored.items()}
        theirs = copy.deepcopy(made.models().theirs["text_encoder"])
        theirs.load_state_dict({**state, "encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)
    source = WanSource([folder], "small", **made.SIZES)
    dtype = source.tensor("text_encoder", "token_embedding.weight").dtype
    assert dtype == (torch.float32 if (folder / "text_encoder").is_dir() else torch.bfloat16)
    assert source.tokenizer is not None and source.tokenizer.name == "spiece.model"
    ids, mask = torch.randint(2, 60, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    expected = theirs.eval()(ids, mask).last_hidden_state
    assert 0.3 < expected.std() < 3
    assert (loaded(source, "text_encoder")(ids, mask) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("name", "keys"), [("wan1.3b", 825), ("wan14b", 1095), ("wan2.2-ti2v-5b", 825)])
def test_names_and_shapes_of_the_full_transformer_are_those_of_diffusers(name: str, keys: int) -> None:
    config = WAN_CONFIGS[name]
    with torch.device("meta"):
        ours = WanTransformer(config)
        theirs = diffusers.WanTransformer3DModel(**made.transformer_config(config))
    assert len(ours.state_dict()) == keys
    assert _shapes(ours, "transformer") == {key: weight.shape for key, weight in theirs.state_dict().items()}


def test_names_and_shapes_of_the_full_vae_and_text_encoder_are_those_of_diffusers_and_transformers() -> None:
    config = UMT5_CONFIGS["umt5-xxl"]
    with torch.device("meta"):
        vae, their_vae = WanVAE(WAN_VAE_CONFIGS["wan2.1"]), diffusers.AutoencoderKLWan()
        encoder = UMT5Encoder(config)
        their_encoder = transformers.UMT5EncoderModel(
            transformers.UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
            )
        )
    assert (len(vae.state_dict()), len(encoder.state_dict())) == (194, 242)
    assert _shapes(vae, "vae") == {key: weight.shape for key, weight in their_vae.state_dict().items()}
    expected = {key: weight.shape for key, weight in their_encoder.state_dict().items()}
    assert expected.pop("encoder.embed_tokens.weight") == expected["shared.weight"]
    assert _shapes(encoder, "text_encoder") == expected


def _shapes(module: torch.nn.Module, part: str) -> dict[str, torch.Size]:
    return {converted(part, name): weight.shape for name, weight in module.state_dict().items()}
