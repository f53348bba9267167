"""Weights in one file with their configuration."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tmd_ref.checkpoint import load_model, save_model
from tmd_ref.umt5 import UMT5Config, UMT5Encoder
from tmd_ref.vae import WanVAE, WanVAEConfig
from tmd_ref.wan import WanConfig, WanTransformer

MODELS: dict[type, Any] = {
    UMT5Encoder: UMT5Config(vocab_size=20, dim=8, num_heads=2, head_dim=4, ffn_dim=16, num_layers=1),
    WanVAE: WanVAEConfig(dim=4, latents_mean=(0.5,) * 16),
    WanTransformer: WanConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=1, text_dim=8, text_len=4),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back_with_its_weights_and_its_configuration(kind, tmp_path):
    model = kind(MODELS[kind])
    save_model(tmp_path / "m.safetensors", model)
    back = load_model(tmp_path / "m.safetensors", kind)
    assert back.config == model.config
    for (name, a), (_, b) in zip(model.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_half_precision_weights_come_back_in_float32(tmp_path):
    save_model(tmp_path / "m.safetensors", WanVAE(MODELS[WanVAE]).half())
    back = load_model(tmp_path / "m.safetensors", WanVAE)
    assert all(weight.dtype == torch.float32 for weight in back.state_dict().values())


def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path):
    save_model(tmp_path / "m.safetensors", WanVAE(MODELS[WanVAE]))
    with pytest.raises(ValueError, match=r"m\.safetensors does not hold a UMT5Encoder"):
        load_model(tmp_path / "m.safetensors", UMT5Encoder)
    with pytest.raises(FileNotFoundError, match="expected the weights of a WanVAE"):
        load_model(tmp_path / "absent.safetensors", WanVAE)


def test_a_vae_written_before_wan22s_fields_is_one_of_wan21(tmp_path):
    model = WanVAE(MODELS[WanVAE])
    stored = dataclasses.asdict(model.config)
    for name in ("decoder_dim", "shortcuts", "patch"):
        del stored[name]
    save_file(model.state_dict(), tmp_path / "m.safetensors", {"config": json.dumps(stored)})
    assert load_model(tmp_path / "m.safetensors", WanVAE).config == model.config
    del stored["dim"]
    save_file(model.state_dict(), tmp_path / "m.safetensors", {"config": json.dumps(stored)})
    with pytest.raises(ValueError, match="does not hold a WanVAE"):
        load_model(tmp_path / "m.safetensors", WanVAE)


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path):
    model = WanVAE(MODELS[WanVAE])
    model.config = dataclasses.replace(model.config, dim=8)
    save_model(tmp_path / "m.safetensors", model)
    with pytest.raises(ValueError, match="does not hold a WanVAE"):
        load_model(tmp_path / "m.safetensors", WanVAE)
