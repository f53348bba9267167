"""A picture file through a bundle's own encoder and back: exported from the built-in VAE, on both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKLWan
from PIL import Image

from tests.helpers.tim_models import CLASSES_16
from tmd_engines import Bundle
from tmd_export import export_bundle, open_source
from tmd_export.checkpoints.names import converted
from tmd_export.sources.tim import RandomTiM
from tmd_ref.distill.data import still
from tmd_ref.scenes import sample_scene
from tmd_ref.vae import WanVAEConfig
from tmd_runtime.command.cli import command
from tmd_runtime.pipeline import Pipeline


class WithBuiltInVAE(RandomTiM):
    """Classes drawn by random weights, on the latents of the built-in VAE."""

    def __init__(self) -> None:
        super().__init__("tim-tiny", 3, CLASSES_16)
        self.built_in: Any = open_source("tiny")

    @property
    def vae(self) -> WanVAEConfig:
        return self.built_in.vae

    def tensor(self, which: str, name: str) -> torch.Tensor:
        return self.built_in.tensor(which, name) if which == "vae" else super().tensor(which, name)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    parts = ("encoder", "backbone", "flow_head", "decoder_first")
    return export_bundle(WithBuiltInVAE(), tmp_path_factory.mktemp("pictures") / "b", parts).bundle


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    """A still as the VAE was trained on, uint8 [64, 64, 3]."""
    return np.asarray(still(sample_scene(np.random.default_rng(5))))


def psnr(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(found.astype(float) - wanted).mean()))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_picture_comes_back_and_its_latents_are_those_of_diffusers(
    bundle: Bundle, scene: np.ndarray, engine: str
) -> None:
    pytest.importorskip(engine)
    source: Any = open_source("tiny")
    vae = source.vae
    theirs = AutoencoderKLWan(
        base_dim=vae.dim,
        z_dim=vae.z_dim,
        dim_mult=list(vae.dim_mult),
        num_res_blocks=vae.num_res_blocks,
        temperal_downsample=list(vae.temporal_downsample),
    ).eval()
    names = [name for name, _ in source.module("vae").named_parameters()]
    theirs.load_state_dict({converted("vae", name): source.tensor("vae", name).float() for name in names})
    with torch.no_grad():
        video = torch.from_numpy(scene.transpose(2, 0, 1)[None, :, None] / 127.5 - 1).float()
        mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.latents_mean, vae.latents_std))
        expected = ((theirs.encode(video).latent_dist.mode() - mean) / std).numpy()
    with Pipeline(bundle, engine) as pipeline:
        latents = pipeline.encode_image(scene)
        np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)
        assert psnr(pipeline.decode(latents)[0], scene) > 28
        large = np.asarray(Image.fromarray(scene).resize((96, 80)))
        assert psnr(pipeline.decode(pipeline.encode_image(large, (96, 80)))[0], large) > 24


def test_little_strength_gives_nearly_the_picture(bundle: Bundle, scene: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(scene).save(tmp_path / "in.png")
    kept = []
    for strength in ("0.05", "0.9"):
        words = ["--bundle", bundle.folder, "--class", 1, "--image", tmp_path / "in.png", "--strength", strength]
        words += ["--steps", 2, "--seed", 1, "--guidance", 1, "--out", tmp_path / "out.png"]
        done = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        with Image.open(tmp_path / "out.png") as made:
            assert made.size == (64, 64) and made.text["strength"] == strength  # type: ignore[attr-defined]
            kept.append(psnr(np.asarray(made), scene))
    assert kept[0] > 24 and kept[1] < kept[0] - 5
