"""DC-AE's decoder for Transition Models: diffusers' own is what it is held to, from module to picture file."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC

from tests.unit import test_tim
from tmd_engines import Bundle
from tmd_export import ExportError, export_bundle
from tmd_export.dcae import CONFIG, WEIGHTS, DCAEDecoder
from tmd_export.tim_source import RandomTiM
from tmd_runtime.pipeline import Pipeline
from tmd_runtime.tiles import tile_starts

FACTOR = 0.41407
# The blocks of dc-ae-f32c32-sana-1.1 in its order, at a small width and with one or two of each.
SMALL: dict[str, Any] = {
    "latent_channels": 16,
    "attention_head_dim": 8,
    "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    "encoder_block_out_channels": [8, 8, 8, 16, 16, 16],
    "decoder_block_out_channels": [8, 8, 8, 16, 16, 16],
    "encoder_layers_per_block": [1] * 6,
    "decoder_layers_per_block": [1, 1, 1, 1, 1, 2],
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": FACTOR,
}
TEXT = replace(test_tim.TEXT, in_channels=16)


def library(**changes: Any) -> AutoencoderDC:
    torch.manual_seed(0)
    model = AutoencoderDC(**{**SMALL, **changes}).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones and zeros in a new model
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dcae")
    library().save_pretrained(path)
    return path


@pytest.mark.parametrize("upsampling", ["interpolate", "pixel_shuffle"])
@pytest.mark.parametrize("size", [(1, 2), (2, 3), (3, 5)])  # fewer tokens than a head has values, and more
def test_the_decoder_is_that_of_diffusers(upsampling: str, size: tuple[int, int]) -> None:
    model = library(upsample_block_type=upsampling)
    ours = DCAEDecoder(dict(model.config), FACTOR).eval()
    ours.load_state_dict({name: value for name, value in model.state_dict().items() if name.startswith("decoder.")})
    latents = torch.randn(2, 16, 1, *size)
    expected = model.decode(latents[:, :, 0] / FACTOR).sample.clamp(-1, 1)
    assert expected.shape[2:] == (32 * size[0], 32 * size[1]) and expected.std() > 0.1
    torch.testing.assert_close(ours.decode(latents)[:, :, 0], expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    source = RandomTiM("tim-t2i", 0, TEXT)
    source.take_decoder(folder)
    assert source.default_parts == ("backbone", "flow_head", "decoder_first")
    return export_bundle(source, tmp_path_factory.mktemp("bundle") / "b", ("decoder_first",)).bundle


def picture(latents: np.ndarray) -> np.ndarray:
    """What diffusers makes of them, in levels of 255."""
    decoded = library().decode(torch.from_numpy(latents[:, :, 0]) / FACTOR).sample.clamp(-1, 1)
    return (decoded[0].permute(1, 2, 0) * 127.5 + 127.5).round().numpy()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_bundle_with_it_makes_the_pictures_of_diffusers(bundle: Bundle, engine: str) -> None:
    pytest.importorskip(engine)
    geometry = bundle.manifest.latents
    assert geometry.spatial_stride == 32 and geometry.std == pytest.approx([1 / FACTOR] * 16)
    with Pipeline(bundle, engine) as pipeline:
        for size in ((1, 1), (2, 3), (4, 6)):
            latents = np.random.default_rng(0).standard_normal((1, 16, 1, *size)).astype(np.float32)
            frames = pipeline.decode(latents)
            assert frames.shape == (1, 32 * size[0], 32 * size[1], 3)
            assert np.abs(frames[0].astype(int) - picture(latents)).max() <= 1


def test_a_large_still_is_decoded_in_tiles(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_runtime.tiles.TILE_PIXELS", 4 * 32)
    monkeypatch.setattr("tmd_runtime.tiles.OVERLAP_PIXELS", 32)
    latents = np.random.default_rng(0).standard_normal((1, 16, 1, 5, 9)).astype(np.float32)
    heard: list[tuple[int, int]] = []
    with Pipeline(bundle, "onnxruntime") as pipeline:
        (frames,) = pipeline.decode_chunks(latents, lambda step: heard.append((step.done, step.total)))
    assert frames.shape == (1, 160, 288, 3) and heard[-6:] == [(number, 6) for number in range(1, 7)]
    found = frames[0].astype(int)
    for top, rows in ((0, slice(0, 32)), (1, slice(128, 160))):  # between them the upper tiles fade into the lower ones
        tiles = [picture(latents[..., top : top + 4, left : left + 4]) for left in (0, 2, 5)]
        tiles = [tile[rows.start - 32 * top : rows.stop - 32 * top] for tile in tiles]
        # Alone a tile is itself; where two meet, one gives way to the other.
        for tile, left, low, high in zip(tiles, (0, 64, 160), (0, 128, 192), (64, 160, 288), strict=True):
            assert np.abs(found[rows, low:high] - tile[:, low - left : high - left]).max() <= 1
        share = (np.arange(64) + 0.5)[None, :, None] / 64
        mixed = tiles[0][:, 64:] * (1 - share) + tiles[1][:, :64] * share
        assert np.abs(found[rows, 64:128] - mixed).max() <= 2


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "starts"),
    [(4, 48, 8, [0]), (48, 48, 8, [0]), (49, 48, 8, [0, 1]), (128, 48, 8, [0, 40, 80]), (129, 48, 8, [0, 27, 54, 81])],
)
def test_tiles_cover_a_side(side: int, tile: int, overlap: int, starts: list[int]) -> None:
    assert tile_starts(side, tile, overlap) == starts
    assert all(later - earlier <= tile - overlap for earlier, later in pairwise(starts))
    assert starts[-1] + tile >= side


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())

    def broken(**changes: Any) -> Path:
        (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
        (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
        return tmp_path

    narrow = RandomTiM("tim-t2i", 0, test_tim.TEXT)
    assert test_tim.TEXT.in_channels != 16
    for source, path, message in (
        (narrow, folder, "decodes latents of 16 channels and 32 pixels"),
        (RandomTiM("tim-t2i", 0, TEXT), broken(attention_head_dim=16), "where .* belongs: copy it again"),
        (RandomTiM("tim-c2i-256", 0), folder, "whose latents tim-c2i-256 does not make"),
    ):
        with pytest.raises(ExportError, match=message):
            source.take_decoder(path)
    (tmp_path / CONFIG).write_text('{"latent_channels": 16}')
    with pytest.raises(ExportError, match="is no configuration of a DC-AE"):
        RandomTiM("tim-t2i", 0, TEXT).take_decoder(tmp_path)
    source = RandomTiM("tim-t2i", 0, TEXT)
    source.take_decoder(folder)
    with pytest.raises(ExportError, match="fp32 only: say --precision bf16,decoder=fp32"):
        export_bundle(source, tmp_path / "b", ("decoder_first",), precision="bf16")
