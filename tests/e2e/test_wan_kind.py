"""A model without inner flow, from weights through tmd-export and tmd-run to latents, against the torch reference."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.helpers.bundle_tools import edit_manifest
from tests.helpers.export_tools import TEXT, VAE, WAN, with_weights
from tmd_engines import Bundle
from tmd_export import RandomSource, export_bundle
from tmd_export.presets.wan import PRESETS
from tmd_ref.samplers import unipc_sample
from tmd_ref.wan import rope_tables
from tmd_runtime import NoiseStream
from tmd_runtime.command.cli import command
from tmd_runtime.files.tensor_files import Embeddings, load_latents, save_embeds

SHAPE = (1, 16, 2, 4, 8)  # 3 frames of 16x8 for this VAE


@pytest.fixture(scope="module")
def source() -> RandomSource:
    return RandomSource("small", 0, fusion=None, wan=WAN, head_blocks=1, vae=VAE, text=TEXT)


@pytest.fixture(scope="module")
def velocity(source: RandomSource):
    """The exported modules with the same weights, as a function of x, t and the prompt."""
    backbone, head = (with_weights(source, part).module for part in ("backbone", "flow_head"))
    cos, sin = rope_tables(SHAPE[2], SHAPE[3] // 2, SHAPE[4] // 2, WAN.head_dim)

    @torch.no_grad()
    def predict(x: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor) -> torch.Tensor:
        features, context = backbone(x, t, prompt_embeds, cos, sin)
        return head(x, t, features, context, cos, sin)

    return predict


def by_command(bundle: Path, embeds: Path, *options: object) -> np.ndarray:
    arguments = ["--bundle", bundle, "--embeds", embeds, "--seed", 4, "--frames", 3, "--size", "16x8", *options]
    latents = bundle.parent / "latents.safetensors"
    result = CliRunner().invoke(command, [str(value) for value in (*arguments, "--save-latents", latents, "--quiet")])
    assert result.exit_code == 0, result.output
    return load_latents(latents, Bundle.open(bundle).manifest).latents


@pytest.fixture(scope="module")
def exported(source: RandomSource, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("export") / "bundle"
    bundle = export_bundle(source, folder, ("backbone", "flow_head"), preset="rcm").bundle
    assert bundle.manifest.model.family == "wan" and bundle.manifest.video.frames == 77
    return bundle


@pytest.mark.parametrize("preset", ["rcm", "wan"])
def test_latents_of_the_command_are_those_of_the_reference(
    exported: Bundle, velocity, preset: str, tmp_path: Path
) -> None:
    bundle = exported
    if preset != "rcm":  # the graphs are the same for every preset, so they are traced once
        shutil.copytree(exported.folder, tmp_path / "bundle")
        edit_manifest(tmp_path / "bundle", lambda manifest: manifest.update(sampler=dict(PRESETS[preset].sampler)))
        bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.sampler.rule == PRESETS[preset].sampler["rule"]
    positive, negative = torch.randn(2, 1, WAN.text_len, WAN.text_dim, generator=torch.Generator().manual_seed(1))
    embeds = Embeddings("a prompt", positive.numpy(), "another", negative.numpy())
    save_embeds(tmp_path / "e.safetensors", embeds, bundle.manifest)
    stream = NoiseStream(4)
    noise = torch.from_numpy(stream.normal(SHAPE))
    if preset == "wan":
        found = by_command(bundle.folder, tmp_path / "e.safetensors", "--steps", 6)
        expected = unipc_sample(velocity, noise, positive, negative, steps=6, shift=3.0, guidance=5.0)
    else:
        found = by_command(bundle.folder, tmp_path / "e.safetensors")
        times = [*PRESETS["rcm"].sampler["times"], 0.0]
        x = (noise * times[0]).double()
        for t, after in pairwise(times):
            told = (torch.tensor([t]) * 1000).bfloat16().float() / 1000
            x = x - t * velocity(x.float(), told, positive)
            if after:
                x = (1 - after) * x + after * torch.from_numpy(stream.normal(SHAPE))
        expected = x
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-4)
