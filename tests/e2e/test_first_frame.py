"""A picture as the first frame of a video: Wan2.2-TI2V-5B in small, from a published layout, against diffusers' own
`WanImageToVideoPipeline`; the same in C++, and without a picture what it was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tmd_runtime
from tests.helpers import synthetic_checkpoints as made
from tmd_engines import Bundle
from tmd_export import export_bundle
from tmd_export.sources.wan import WanSource

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
