"""A picture as the first frame of a video: Wan2.2-TI2V-5B in small, from a published layout, against diffusers' own
`WanImageToVideoPipeline`; the same in C++, and without a picture what it was before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tmd_runtime
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.bundle_tools import edit_manifest
from tmd_engines import Bundle
from tmd_engines.command.verify import verify
from tmd_export import export_bundle
from tmd_export.inspection import inspect
from tmd_export.presets.wan import PRESETS
from tmd_export.sources.wan import WanSource
from tmd_runtime import NoiseStream

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

SEED, STEPS, FRAMES, SIZE, GUIDANCE = 4, 3, 9, (96, 64), 5.0
SHAPE = (1, 48, 3, 4, 6)
ENGINES = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_diffusers(tmp_path_factory.mktemp("layout") / "Wan2.2-TI2V-5B-Diffusers", wan22=True)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    source, parts = WanSource([folder], "small", **made.SIZES22), ("encoder", "backbone", "flow_head")
    assert set(parts) <= set(source.default_parts)
    return export_bundle(source, folder.parent / "bundle", parts, grid="diffusers", verify=False).bundle


@pytest.fixture(scope="module")
def embeds() -> tuple[np.ndarray, np.ndarray]:
    """Of a prompt and of a negative one."""
    rng = np.random.default_rng(7)
    first, second = rng.standard_normal((2, 1, made.WAN.text_len, made.WAN.text_dim), np.float32)
    return first, second


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """uint8 [H, W, 3], smooth and with edges, of the size of the video: nobody scales it."""
    rows, columns = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    return np.stack([2 * rows, 2 * columns, 255 * ((rows // 16 + columns // 16) % 2)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def expected(folder: Path, embeds: tuple, picture: np.ndarray) -> np.ndarray:
    """Latents of `WanImageToVideoPipeline` as it is, with its own times, noise, guidance and encoder."""
    theirs = made.models(wan22=True).theirs
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    pipeline = diffusers.WanImageToVideoPipeline(
        None, None, theirs["vae"], scheduler, transformer=theirs["transformer"], expand_timesteps=True
    )
    found: Any = pipeline(
        Image.fromarray(picture),
        prompt_embeds=torch.from_numpy(embeds[0]),
        negative_prompt_embeds=torch.from_numpy(embeds[1]),
        guidance_scale=GUIDANCE,
        height=SIZE[1],
        width=SIZE[0],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames
    return found.numpy()


def wishes(embeds: tuple, **more: Any) -> Any:
    return {"seed": SEED, "steps": STEPS, "frames": FRAMES, "size": SIZE, "negative_embeds": embeds[1], **more}


@pytest.mark.parametrize("engine", ENGINES)
def test_latents_are_those_of_diffusers(
    engine: str, bundle: Bundle, embeds: tuple, picture: np.ndarray, expected: np.ndarray
) -> None:
    pytest.importorskip(engine)
    with tmd_runtime.load(bundle.folder, engine=engine, threads=1) as pipeline:
        first = pipeline.encode_image(picture, SIZE)
        found = pipeline.denoise(embeds[0], init_latents=first, **wishes(embeds))
        without = pipeline.denoise(embeds[0], **wishes(embeds))
    assert found.shape == expected.shape == SHAPE and 0.1 < expected.std() < 10
    np.testing.assert_array_equal(found[:, :, :1], first)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert np.abs(without - found)[:, :, 1:].max() > 0.01, "the picture plays a part"


@torch.no_grad()
def test_a_few_steps_are_those_of_turbo(bundle: Bundle, embeds: tuple, picture: np.ndarray, tmp_path: Path) -> None:
    """Its loop: the sigmas of a table of shift 8 nearest to the listed times; the picture in x, in x0, and again in
    what the fresh noise makes of x0; every token its own time."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")  # the graphs are the same for every preset
    edit_manifest(tmp_path / "bundle", lambda each: each.update(sampler=dict(PRESETS["wan2.2-turbo"].sampler)))
    with tmd_runtime.load(tmp_path / "bundle", engine="onnxruntime", threads=1) as pipeline:
        first = torch.from_numpy(pipeline.encode_image(picture, SIZE))
        found = pipeline.denoise(embeds[0], seed=SEED, frames=FRAMES, size=SIZE, init_latents=first.numpy())
    table, listed = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0), (1000, 750, 500, 250)
    sigmas = [float(table.sigmas[(table.timesteps - t).abs().argmin()]) for t in listed]
    stream, network = NoiseStream(SEED), made.models(wan22=True).theirs["transformer"]
    mask = torch.ones(SHAPE)
    mask[:, :, 0] = 0

    def masked(latents: torch.Tensor) -> torch.Tensor:
        return (1 - mask) * first + mask * latents

    x, prompt = masked(torch.from_numpy(stream.normal(SHAPE))), torch.from_numpy(embeds[0])
    for t, sigma, after in zip(listed, sigmas, (*sigmas[1:], 0.0), strict=True):
        times = (mask[:, 0, :, ::2, ::2] * t).flatten(1)
        x0 = masked(x - sigma * network(x, times, prompt, return_dict=False)[0])
        x = masked((1 - after) * x0 + after * torch.from_numpy(stream.normal(SHAPE))) if after else x0
    assert 0.1 < x.std() < 10
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-4)


def test_a_bundle_says_what_it_can(bundle: Bundle, folder: Path) -> None:
    model: Any = bundle.manifest.model
    assert model.first_frame and "encoder" in bundle.manifest.graphs
    for name in ("backbone", "flow_head", "update"):
        assert "held" in {spec.name for spec in bundle.manifest.graphs[name].inputs}
    found = inspect(WanSource([folder], "small", **made.SIZES22), None, None)
    assert "encoder" in found["parts"] and not found["absent"]
    assert all(check.problem is None for check in verify(bundle, "onnxruntime", threads=1))
