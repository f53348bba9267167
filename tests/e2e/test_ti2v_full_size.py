"""The transformer of Wan2.2-TI2V-5B at its real size: its export, and its steps beside diffusers's, picture or not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tmd_runtime
from tests.e2e.test_full_size import cosine_of, run
from tests.helpers.bundle_tools import edit_manifest
from tests.helpers.synthetic_checkpoints import fill, write_hollow
from tmd_engines import Bundle
from tmd_export.checkpoints.names import converted
from tmd_export.presets.wan import PRESETS
from tmd_export.sources.random_weights import random_tensor
from tmd_ref.wan import WAN_CONFIGS, WanTransformer
from tmd_runtime import NoiseStream

diffusers = pytest.importorskip("diffusers")

CONFIG = WAN_CONFIGS["wan2.2-ti2v-5b"]
SEED, FRAMES, SIZE, LATENTS = 3, 9, (128, 128), (1, 48, 3, 8, 8)
TIMES = (1000.0, 757.0, 522.0)
NOISIEST = 5 * 0.999 / (1 + 4 * 0.999)
"""The time of a single step of Wan's own grid with shift 5; the network is told its whole thousandths."""


class Place(NamedTuple):
    """The official file, and the bundle that was made from it."""

    weights: Path
    bundle: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    home = tmp_path_factory.mktemp("ti2v")
    folder = home / "Wan2.2-TI2V-5B"
    folder.mkdir()
    with torch.device("meta"):
        state = WanTransformer(CONFIG).state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    file = write_hollow(folder / "diffusion_pytorch_model.safetensors", shapes, "BF16")
    fill(file, lambda name: random_tensor(name, state[name].shape, 0))
    about = {
        "_class_name": "WanModel", "model_type": "ti2v", "dim": CONFIG.dim, "ffn_dim": CONFIG.ffn_dim,
        "num_heads": CONFIG.num_heads, "num_layers": CONFIG.num_layers, "in_dim": 48, "out_dim": 48,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about))
    words = ("--checkpoint", folder, "--preset", "fastwan2.2", "--precision", "bf16", "--out", home / "bundle")
    done = run("tmd_export", *words)
    print(f"\n{done.stdout}\ntmd-export: {done.seconds:.0f} s of CPU time, {done.peak / 2**20:.0f} MiB")
    assert done.peak < 4 << 30
    yield Place(file, home / "bundle")
    shutil.rmtree(home)


@pytest.fixture(scope="module")
def embeds() -> torch.Tensor:
    rows = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)
    rows[:, :23].normal_(generator=torch.Generator().manual_seed(2))
    return rows


def theirs(weights: Path) -> Any:
    """diffusers' transformer with mapped bfloat16 weights; each part computes in float32, one part at a time."""
    with torch.device("meta"):
        network = diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=CONFIG.num_heads, attention_head_dim=128,
            in_channels=48, out_channels=48, ffn_dim=CONFIG.ffn_dim, num_layers=CONFIG.num_layers,
        )  # fmt: skip
    state = {converted("transformer", name): weight for name, weight in load_file(weights).items()}
    network.load_state_dict(state, assign=True)
    network.rope = diffusers.models.transformers.transformer_wan.WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    network.scale_shift_table.data = network.scale_shift_table.data.float()
    parts = [network.patch_embedding, network.condition_embedder, *network.blocks, network.norm_out, network.proj_out]
    for part in parts:
        part.register_forward_pre_hook(lambda module, _: module.float() and None)
        part.register_forward_hook(lambda module, _, out: (module.bfloat16(), out)[1])
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def expected(place: Place, embeds: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The latents of FastWan's three steps; a picture's latents; what one step of Wan2.2's own makes behind them."""
    network, stream = theirs(place.weights), NoiseStream(SEED)
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    sigmas = [float(table.sigmas[(table.timesteps - t).abs().argmin()]) for t in TIMES]
    x = torch.from_numpy(stream.normal(LATENTS))
    for t, sigma, after in zip(TIMES, sigmas, (*sigmas[1:], 0.0), strict=True):
        x0 = x - sigma * network(x, torch.tensor([t]), embeds, return_dict=False)[0]
        x = (1 - after) * x0 + after * torch.from_numpy(stream.normal(LATENTS)) if after else x0
    first = torch.randn(1, 48, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    behind = torch.from_numpy(NoiseStream(SEED).normal(LATENTS))
    behind[:, :, :1] = first
    mask = torch.ones(3, 4, 4)
    mask[0] = 0
    behind = behind - NOISIEST * network(behind, (999 * mask).reshape(1, -1), embeds, return_dict=False)[0]
    return x.numpy(), first.numpy(), behind[:, :, 1:].numpy()


@pytest.mark.slow
@torch.no_grad()
def test_steps_of_the_5b_are_those_of_diffusers(
    place: Place, embeds: torch.Tensor, expected: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    """22 GB of disk, minutes, and less memory than the 20.5 GB that the estimate for ONNX Runtime says."""
    wishes: Any = {"seed": SEED, "frames": FRAMES, "size": SIZE}
    with tmd_runtime.load(place.bundle, engine="openvino", threads=2, memory="all") as pipeline:
        few = pipeline.denoise(embeds.numpy(), **wishes)
    edit_manifest(place.bundle, lambda manifest: manifest.update(sampler=dict(PRESETS["wan2.2-ti2v"].sampler)))
    assert Bundle.open(place.bundle).manifest.sampler.rule == "unipc"
    with tmd_runtime.load(place.bundle, engine="openvino", threads=2, memory="all") as pipeline:
        settings = pipeline.settings(steps=1, guidance=1.0, **wishes)
        assert settings.times[0] == pytest.approx(NOISIEST)
        held = pipeline.denoise(embeds.numpy(), init_latents=expected[1], steps=1, guidance=1.0, **wishes)
    np.testing.assert_array_equal(held[:, :, :1], expected[1])
    for name, found, wanted in (("three steps", few, expected[0]), ("behind a picture", held[:, :, 1:], expected[2])):
        error, cosine = np.abs(found - wanted).max(), cosine_of(found, wanted)
        print(f"{name}: deviation {wanted.std():.3f}, largest error {error:.2e}, 1 - cosine {1 - cosine:.2e}")
        assert 0.1 < wanted.std() < 10 and cosine >= 0.999
