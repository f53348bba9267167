"""Autoencoders of stills for Transition Models: diffusers' own are what they are held to, from module to picture."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from safetensors.torch import load_file, save_file

from tests.helpers.tim_models import CLASSES as SMALL_CLASSES
from tests.helpers.tim_models import TEXT_16 as TEXT
from tmd_engines import Bundle, load
from tmd_engines.command.build import write_for_trtexec
from tmd_engines.cost.tiling import tile_starts
from tmd_export import ExportError, export_bundle, open_source
from tmd_export.sources.still_vae import CONFIG, WEIGHTS, StillVAE
from tmd_export.sources.tim import RandomTiM
from tmd_runtime.pipeline import Pipeline

# The blocks of dc-ae-f32c32-sana-1.1 and of sd-vae-ft-ema in their order, at a small width, with one or two of each.
DCAE: dict[str, Any] = {
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
    "scaling_factor": 0.41407,
}
SD_VAE: dict[str, Any] = {
    "latent_channels": 16,  # 4 in the released one
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
KINDS: dict[str, tuple[Any, dict[str, Any], float, str]] = {
    "dcae": (AutoencoderDC, DCAE, 0.41407, "tim-t2i"),
    "sd-vae": (AutoencoderKL, SD_VAE, 0.18215, "tim-c2i-256"),
}
CLASSES = replace(SMALL_CLASSES, in_channels=16)


def library(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    made, config, _, _ = KINDS[kind]
    model = made(**{**config, **changes}).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones and zeros in a new model
            weight.copy_(torch.randn_like(weight) * 0.2 + (1.0 if name.endswith("weight") else 0.0))
    return model


def decoded(model: Any, latents: torch.Tensor, factor: float) -> torch.Tensor:
    """What diffusers makes of latents `[B,C,1,H,W]`."""
    return model.decode(latents[:, :, 0] / factor).sample.clamp(-1, 1)


def encoded(model: Any, pictures: torch.Tensor, factor: float) -> torch.Tensor:
    """What diffusers makes of pictures `[B,3,H,W]`, as latents `[B,C,1,h,w]`."""
    found = model.encode(pictures)
    return (factor * (found.latent if hasattr(found, "latent") else found.latent_dist.mean)).unsqueeze(2)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dcae", {}),
        ("dcae", {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}),
        ("sd-vae", {}),
        ("sd-vae", {"use_quant_conv": False, "use_post_quant_conv": False}),
    ],
)
@pytest.mark.parametrize("size", [(1, 2), (2, 3), (3, 5)])  # fewer tokens than a head of DC-AE has values, and more
def test_an_autoencoder_is_that_of_diffusers(kind: str, changes: dict[str, Any], size: tuple[int, int]) -> None:
    model, factor = library(kind, **changes), KINDS[kind][2]
    ours = StillVAE({**model.config, "_class_name": type(model).__name__}, factor).eval()
    ours.load_state_dict(model.state_dict())
    latents = torch.randn(2, 16, 1, *size)
    expected = decoded(model, latents, factor)
    assert expected.shape[2:] == (ours.spatial_stride * size[0], ours.spatial_stride * size[1])
    assert expected.std() > 0.1
    torch.testing.assert_close(ours.decode(latents)[:, :, 0].clamp(-1, 1), expected, rtol=0, atol=1e-5)
    pictures = torch.rand(2, 3, *expected.shape[2:]) * 2 - 1
    expected = encoded(model, pictures, factor)
    assert expected.shape == latents.shape and expected.std() > 0.01
    torch.testing.assert_close(ours.encode(pictures.unsqueeze(2)), expected, rtol=0, atol=1e-5)


def saved(kind: str, path: Path) -> Path:
    library(kind).save_pretrained(path)
    if kind == "sd-vae":  # as sd-vae-ft-ema lies on its hub: names of 2022, and no factor
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(path / WEIGHTS)
        for new, old in names.items():
            tensors = {name.replace(new, old): weight for name, weight in tensors.items()}
        assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
        save_file(tensors, path / WEIGHTS)
        config = json.loads((path / CONFIG).read_text())
        del config["scaling_factor"]
        (path / CONFIG).write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(kind, tmp_path_factory.mktemp(kind))


def source(kind: str) -> RandomTiM:
    return RandomTiM(KINDS[kind][3], 0, TEXT if kind == "dcae" else CLASSES)


@pytest.fixture(scope="module")
def bundle(kind: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    taken = source(kind)
    taken.take_decoder(folder)
    assert taken.default_parts == ("encoder", "backbone", "flow_head", "decoder_first")
    return export_bundle(taken, tmp_path_factory.mktemp("bundle") / "b", ("encoder", "decoder_first")).bundle


def picture(kind: str, latents: np.ndarray) -> np.ndarray:
    """What diffusers makes of them, in levels of 255."""
    found = decoded(library(kind), torch.from_numpy(latents), KINDS[kind][2])
    return (found[0].permute(1, 2, 0) * 127.5 + 127.5).round().numpy()


@pytest.mark.long
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_bundle_with_it_makes_the_pictures_and_latents_of_diffusers(kind: str, bundle: Bundle, engine: str) -> None:
    pytest.importorskip(engine)
    factor, geometry = KINDS[kind][2], bundle.manifest.latents
    assert geometry.std == pytest.approx([1 / factor] * 16)
    with Pipeline(bundle, engine) as pipeline, load(bundle, "encoder", engine) as encoder:
        for size in ((1, 1), (2, 3), (4, 6)):
            latents = np.random.default_rng(0).standard_normal((1, 16, 1, *size)).astype(np.float32)
            frames = pipeline.decode(latents)
            assert frames.shape == (1, *(geometry.spatial_stride * side for side in size), 3)
            assert np.abs(frames[0].astype(int) - picture(kind, latents)).max() <= 1
            found = {"latents": np.empty_like(latents)}
            encoder.run({"frames": frames[None]}, found)
            given = torch.from_numpy(frames.transpose(0, 3, 1, 2) / 127.5 - 1).float()
            expected = encoded(library(kind), given, factor).numpy()
            np.testing.assert_allclose(found["latents"], expected, rtol=0, atol=2e-5)


def test_tensorrt_is_given_what_its_parser_takes_and_the_same_values(bundle: Bundle, tmp_path: Path) -> None:
    side = 2 * bundle.manifest.latents.spatial_stride
    for version in ((10, 3), (11, 0)):  # refused by what its support matrix lacks
        folder = tmp_path / f"{version[0]}"
        assert len(list(write_for_trtexec(bundle, folder, version, (side, side, 1)))) == 2
    picture = np.random.default_rng(0).integers(0, 256, (1, 1, side, side, 3)).astype(np.uint8)
    with load(bundle, "encoder", "onnxruntime") as encoder:
        found = {"latents": np.empty((1, 16, 1, 2, 2), np.float32)}
        encoder.run({"frames": picture}, found)
    lowered = onnxruntime.InferenceSession(tmp_path / "10" / "encoder.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(lowered.run(None, {"frames": picture})[0], found["latents"], rtol=0, atol=1e-5)


def test_a_large_still_is_decoded_in_tiles(kind: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = bundle.manifest.latents.spatial_stride
    monkeypatch.setattr("tmd_engines.cost.tiling.TILE_PIXELS", 4 * unit)
    monkeypatch.setattr("tmd_engines.cost.tiling.OVERLAP_PIXELS", unit)
    latents = np.random.default_rng(0).standard_normal((1, 16, 1, 5, 9)).astype(np.float32)
    heard: list[tuple[int, int]] = []
    with Pipeline(bundle, "onnxruntime") as pipeline:
        (frames,) = pipeline.decode_chunks(latents, lambda step: heard.append((step.done, step.total)))
    assert frames.shape == (1, 5 * unit, 9 * unit, 3) and heard[-6:] == [(number, 6) for number in range(1, 7)]
    found = frames[0].astype(int)
    for top, rows in ((0, (0, 1)), (1, (4, 5))):  # between them the upper tiles fade into the lower ones
        tiles = [picture(kind, latents[..., top : top + 4, left : left + 4]) for left in (0, 2, 5)]
        tiles = [tile[(rows[0] - top) * unit : (rows[1] - top) * unit] for tile in tiles]
        strip = found[rows[0] * unit : rows[1] * unit]
        # Alone a tile is itself; where two meet, one gives way to the other.
        for tile, left, low, high in zip(tiles, (0, 2, 5), (0, 4, 6), (2, 5, 9), strict=True):
            own = tile[:, (low - left) * unit : (high - left) * unit]
            assert np.abs(strip[:, low * unit : high * unit] - own).max() <= 1
        share = (np.arange(2 * unit) + 0.5)[None, :, None] / (2 * unit)
        mixed = tiles[0][:, 2 * unit :] * (1 - share) + tiles[1][:, : 2 * unit] * share
        assert np.abs(strip[:, 2 * unit : 4 * unit] - mixed).max() <= 2


@pytest.mark.parametrize(
    ("side", "tile", "starts"),
    [(4, 48, [0]), (48, 48, [0]), (49, 48, [0, 1]), (128, 48, [0, 40, 80]), (129, 48, [0, 27, 54, 81])],
)
def test_tiles_cover_a_side(side: int, tile: int, starts: list[int]) -> None:
    stride, overlap = 32, 8  # pixels per latent, and latents in 256 pixels
    assert tile_starts(side, tile, stride) == starts
    assert all(later - earlier <= tile - overlap for earlier, later in pairwise(starts))
    assert starts[-1] + tile >= side


def test_what_does_not_fit_is_refused(kind: str, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())

    def changed(changes: dict[str, Any]) -> Path:
        (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
        (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
        return tmp_path

    other = "tim-c2i-256" if kind == "dcae" else "tim-t2i"
    wider = {"attention_head_dim": 16} if kind == "dcae" else {"block_out_channels": [8, 8, 16, 32]}
    unnamed: dict[str, Any] = {"scaling_factor": None}
    stride = 32 if kind == "dcae" else 8
    for taken, changes, message in (
        (
            RandomTiM(other, 0, TEXT),
            unnamed,
            f"latents of 16 channels and {stride} pixels, and .* 16 and {40 - stride}",
        ),
        (RandomTiM(KINDS[kind][3], 0, replace(TEXT, in_channels=4)), unnamed, "do not belong together. Take dc-ae"),
        (source(kind), wider, "belongs: copy it again"),
        (source(kind), {"scaling_factor": 0.13025}, "scales its latents by 0.13025, and this model was trained"),
        (source(kind), {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny is no autoencoder that is known here"),
        (RandomTiM("tim-tiny", 0), {}, "tim-tiny has a decoder of its own"),
    ):
        with pytest.raises(ExportError, match=message):
            taken.take_decoder(changed(changes))
    (tmp_path / CONFIG).write_text('{"latent_channels": 16}')
    with pytest.raises(ExportError, match="is no configuration of an autoencoder"):
        source(kind).take_decoder(tmp_path)
    taken = source(kind)
    taken.take_decoder(changed({"scaling_factor": 1.0}))  # what diffusers writes where nobody said
    for part, precision, message in (
        ("decoder_first", "bf16", "fp32 only: say --precision bf16,decoder=fp32"),
        ("encoder", "encoder=bf16", "this autoencoder can be exported in fp32 only"),
        ("encoder", "encoder=int8", "encoder cannot be int8"),
    ):
        with pytest.raises((ExportError, ValueError), match=message):
            export_bundle(taken, tmp_path / "b", (part,), precision=precision)
    with pytest.raises(ExportError, match=r"tiny has no graph encoder \(only a model that takes a picture has"):
        export_bundle(open_source("tiny"), tmp_path / "b", ("encoder",))
