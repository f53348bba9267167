"""Wan2.2-TI2V-5B in small, from a published layout to frames, against diffusers' own pipelines, from a prompt alone and
with a picture as the first frame; the same in C++."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import tmd_runtime
from tests.helpers import synthetic_checkpoints as made
from tests.helpers.bundle_tools import edit_manifest
from tests.helpers.cpp_tools import in_cpp
from tests.helpers.nvidia_builder import CANONICAL, PRIMITIVES, build_graph, figures_of, nvidia_builder
from tmd_engines import Bundle
from tmd_engines.command.verify import verify
from tmd_engines.cost.sizing import estimate
from tmd_export import export_bundle
from tmd_export.inspection import inspect
from tmd_export.presets.wan import PRESETS, WAN_NEGATIVE_PROMPT
from tmd_export.sources.wan import WanSource
from tmd_ref.text import Tokenizer
from tmd_runtime import NoiseStream
from tmd_runtime.compat.diffusers import TmdPipeline

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPT, SEED, STEPS, FRAMES, SIZE = "a red circle", 4, 3, 5, (64, 64)
LONGER, WIDER, PICTURED = 9, (96, 64), (1, 48, 3, 4, 6)
"""Frames, size and latents of the videos that have a picture as their first frame."""
ENGINES = ("onnxruntime", "openvino")


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.write_diffusers(tmp_path_factory.mktemp("layout") / "Wan2.2-TI2V-5B-Diffusers", wan22=True)


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    """The denoiser and the encoder of pictures: tracing the others takes most of the time."""
    source, parts = WanSource([folder], "small", **made.SIZES22), ("encoder", "backbone", "flow_head")
    return export_bundle(source, folder.parent / "bundle", parts, grid="diffusers", verify=False).bundle


@pytest.fixture(scope="module")
def whole(folder: Path) -> Bundle:
    return export_bundle(WanSource([folder], "small", **made.SIZES22), folder.parent / "whole", grid="diffusers").bundle


@pytest.fixture(scope="module")
@torch.no_grad()
def embeds(folder: Path) -> list[torch.Tensor]:
    """What transformers' UMT5 makes of the prompt and of the negative one, zero behind them."""
    tokenizer = Tokenizer(folder / "tokenizer" / "spiece.model", made.WAN.text_len)
    found = []
    for prompt in (PROMPT, WAN_NEGATIVE_PROMPT):
        ids, mask = (torch.from_numpy(value) for value in tokenizer([prompt]))
        encoder = made.models(wan22=True).theirs["text_encoder"]
        found.append(encoder(ids, mask).last_hidden_state * mask[..., None])
    return found


@pytest.fixture(scope="module")
def expected(folder: Path, embeds: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Latents and frames (0..255, not rounded) of `WanPipeline` as it is, with its own times, noise and guidance."""
    config = json.loads((folder / "model_index.json").read_text())
    theirs = made.models(wan22=True).theirs
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    pipeline = diffusers.WanPipeline(
        None, None, theirs["vae"], scheduler, theirs["transformer"], expand_timesteps=config["expand_timesteps"]
    )
    results = [
        pipeline(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            guidance_scale=5.0,
            height=SIZE[1],
            width=SIZE[0],
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            max_sequence_length=made.WAN.text_len,
            generator=torch.Generator().manual_seed(SEED),
            output_type=kind,
        ).frames
        for kind in ("latent", "np")
    ]
    return results[0].numpy(), 255 * results[1][0]


def test_a_bundle_of_it_says_so(bundle: Bundle, folder: Path) -> None:
    manifest = bundle.manifest
    assert (manifest.model.family, manifest.model.architecture) == ("wan", "wan2.2-ti2v")
    latents, video = manifest.latents, manifest.video
    assert (latents.channels, latents.temporal_stride, latents.spatial_stride) == (48, 4, 16)
    assert (video.frames, video.width, video.height, video.fps) == (121, 1280, 704, 24)
    sampler: Any = manifest.sampler
    assert (sampler.rule, sampler.steps, sampler.shift, sampler.guidance) == ("unipc", 50, 5.0, 5.0)
    found = inspect(WanSource([folder], "small", **made.SIZES22), None, None)
    assert found["architecture"] == "wan2.2-ti2v"
    assert found["latents"] == {"channels": 48, "temporal_stride": 4, "spatial_stride": 16}


def check_latents(found: np.ndarray | None, expected: np.ndarray) -> None:
    assert found is not None and found.shape == expected.shape == (1, 48, 2, 4, 4) and 0.1 < expected.std() < 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_latents_are_those_of_diffusers(
    engine: str, bundle: Bundle, embeds: list[torch.Tensor], expected: tuple
) -> None:
    pytest.importorskip(engine)
    prompt, negative = (one.numpy() for one in embeds)
    with tmd_runtime.load(bundle.folder, engine=engine, threads=1) as pipeline:
        wishes: Any = {"steps": STEPS, "frames": FRAMES, "size": SIZE, "negative_embeds": negative}
        found = pipeline.denoise(prompt, seed=SEED, **wishes)
    check_latents(found, expected[0])


@pytest.mark.parametrize(
    ("preset", "listed"), [("fastwan2.2", (1000, 757, 522)), ("wan2.2-turbo", (1000, 750, 500, 250))]
)
@torch.no_grad()
def test_a_few_steps_are_those_of_their_publishers(
    preset: str, listed: tuple[int, ...], bundle: Bundle, embeds: list[torch.Tensor], tmp_path: Path
) -> None:
    """Their loop: the sigmas of a table of shift 8 nearest to the listed times, x0, fresh noise up to the next one."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")  # the graphs are the same for every preset
    edit_manifest(tmp_path / "bundle", lambda manifest: manifest.update(sampler=dict(PRESETS[preset].sampler)))
    with tmd_runtime.load(tmp_path / "bundle", engine="onnxruntime", threads=1) as pipeline:
        found = pipeline.denoise(embeds[0].numpy(), seed=SEED, frames=FRAMES, size=SIZE)
    table = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0)
    sigmas = [float(table.sigmas[(table.timesteps - t).abs().argmin()]) for t in listed]
    stream, network = NoiseStream(SEED), made.models(wan22=True).theirs["transformer"]
    x = torch.from_numpy(stream.normal((1, 48, 2, 4, 4)))
    for t, sigma, after in zip(listed, sigmas, (*sigmas[1:], 0.0), strict=True):
        x0 = x - sigma * network(x, torch.tensor([float(t)]), embeds[0], return_dict=False)[0]
        x = (1 - after) * x0 + after * torch.from_numpy(stream.normal(tuple(x.shape))) if after else x0
    check_latents(found, x.numpy())


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """uint8 [H, W, 3], smooth and with edges, of the size of the video: nobody scales it."""
    rows, columns = np.mgrid[0 : WIDER[1], 0 : WIDER[0]]
    return np.stack([2 * rows, 2 * columns, 255 * ((rows // 16 + columns // 16) % 2)], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def pictured(folder: Path, embeds: list[torch.Tensor], picture: np.ndarray) -> np.ndarray:
    return image_to_video(folder, embeds, picture, "latent")


def image_to_video(folder: Path, embeds: list[torch.Tensor], picture: np.ndarray, kind: str) -> np.ndarray:
    """What `WanImageToVideoPipeline` gives as it is, with its own times, noise, guidance, encoder and decoder."""
    theirs = made.models(wan22=True).theirs
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    pipeline = diffusers.WanImageToVideoPipeline(
        None, None, theirs["vae"], scheduler, transformer=theirs["transformer"], expand_timesteps=True
    )
    found: Any = pipeline(
        Image.fromarray(picture),
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        guidance_scale=5.0,
        height=WIDER[1],
        width=WIDER[0],
        num_frames=LONGER,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type=kind,
    ).frames
    return np.asarray(found)


def wishes(embeds: list[torch.Tensor], **more: Any) -> Any:
    return {"seed": SEED, "steps": STEPS, "frames": LONGER, "size": WIDER, "negative_embeds": embeds[1].numpy(), **more}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_picture_as_the_first_frame_gives_the_latents_of_diffusers(
    engine: str, bundle: Bundle, embeds: list[torch.Tensor], picture: np.ndarray, pictured: np.ndarray
) -> None:
    pytest.importorskip(engine)
    with tmd_runtime.load(bundle.folder, engine=engine, threads=1) as pipeline:
        first = pipeline.encode_image(picture, WIDER)
        found = pipeline.denoise(embeds[0].numpy(), init_latents=first, **wishes(embeds))
        without = pipeline.denoise(embeds[0].numpy(), **wishes(embeds))
    assert found.shape == pictured.shape == PICTURED and 0.1 < pictured.std() < 10
    np.testing.assert_array_equal(found[:, :, :1], first)
    np.testing.assert_allclose(found, pictured, rtol=0, atol=1e-4)
    assert np.abs(without - found)[:, :, 1:].max() > 0.01, "the picture plays a part"


@torch.no_grad()
def test_a_few_steps_are_those_of_turbo(
    bundle: Bundle, embeds: list[torch.Tensor], picture: np.ndarray, tmp_path: Path
) -> None:
    """Its loop: the sigmas of a table of shift 8 nearest to the listed times; the picture in x, in x0, and again in
    what the fresh noise makes of x0; every token its own time."""
    shutil.copytree(bundle.folder, tmp_path / "bundle")  # the graphs are the same for every preset
    edit_manifest(tmp_path / "bundle", lambda each: each.update(sampler=dict(PRESETS["wan2.2-turbo"].sampler)))
    with tmd_runtime.load(tmp_path / "bundle", engine="onnxruntime", threads=1) as pipeline:
        first = torch.from_numpy(pipeline.encode_image(picture, WIDER))
        found = pipeline.denoise(embeds[0].numpy(), seed=SEED, frames=LONGER, size=WIDER, init_latents=first.numpy())
    table, listed = diffusers.FlowMatchEulerDiscreteScheduler(shift=8.0), (1000, 750, 500, 250)
    sigmas = [float(table.sigmas[(table.timesteps - t).abs().argmin()]) for t in listed]
    stream, network = NoiseStream(SEED), made.models(wan22=True).theirs["transformer"]
    mask = torch.ones(PICTURED)
    mask[:, :, 0] = 0

    def masked(latents: torch.Tensor) -> torch.Tensor:
        return (1 - mask) * first + mask * latents

    x, prompt = masked(torch.from_numpy(stream.normal(PICTURED))), embeds[0]
    for t, sigma, after in zip(listed, sigmas, (*sigmas[1:], 0.0), strict=True):
        times = (mask[:, 0, :, ::2, ::2] * t).flatten(1)
        x0 = masked(x - sigma * network(x, times, prompt, return_dict=False)[0])
        x = masked((1 - after) * x0 + after * torch.from_numpy(stream.normal(PICTURED))) if after else x0
    assert 0.1 < x.std() < 10
    np.testing.assert_allclose(found, x.numpy(), rtol=0, atol=1e-4)


def test_a_bundle_says_that_it_takes_a_picture(bundle: Bundle, folder: Path) -> None:
    model: Any = bundle.manifest.model
    assert model.first_frame and "encoder" in bundle.manifest.graphs
    for name in ("backbone", "flow_head", "update"):
        assert "held" in {spec.name for spec in bundle.manifest.graphs[name].inputs}
    found = inspect(WanSource([folder], "small", **made.SIZES22), None, None)
    assert "encoder" in found["parts"] and not found["absent"]
    assert all(check.problem is None for check in verify(bundle, "onnxruntime", threads=1))


def test_nvidias_builder_takes_the_graphs_of_a_held_frame(bundle: Bundle) -> None:
    """TensorRT for RTX, in both lowerings, for one size and for a range."""
    pytest.importorskip("tensorrt_rtx", reason="pip install '.[rtx]'")
    sizes = ((32, 32, 1), (64, 32, 5), (64, 64, 9))
    with nvidia_builder():
        for graph in bundle.manifest.graphs:
            for version, some in ((CANONICAL, sizes[1:2]), (PRIMITIVES, sizes)):
                model, ranges = build_graph(bundle, graph, version, some)
                assert figures_of(model, ranges, str(bundle.graph_path(graph)))["plan"] > 1000


def counted(run: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_its_operations_are_those_that_torch_counts(bundle: Bundle) -> None:
    stages, wan = estimate(bundle, width=96, height=64, frames=FRAMES).stages, made.WAN22
    with torch.device("meta"):
        network = diffusers.WanTransformer3DModel(**made.transformer_config(wan))
        given = torch.empty(1, 48, 2, 4, 6), torch.empty(1), torch.empty(1, wan.text_len, wan.text_dim)
    again = 3 * 2 * (wan.freq_dim * wan.dim + 7 * wan.dim**2)  # both graphs embed the time, and that of held frames
    assert stages["backbone"].flops + stages["flow_head"].flops == counted(lambda: network(*given)) + again


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_frames_are_those_of_diffusers_and_in_cpp_the_same(
    engine: str, whole: Bundle, expected: tuple, tmp_path: Path
) -> None:
    latents, frames = expected
    pytest.importorskip(engine)
    with tmd_runtime.load(whole.folder, engine=engine, threads=1) as pipeline:
        found = pipeline(PROMPT, seed=SEED, steps=STEPS, frames=FRAMES, size=SIZE)
    check_latents(found.latents, latents)
    assert found.frames.shape == frames.shape == (FRAMES, SIZE[1], SIZE[0], 3)
    assert frames.std() > 10 and ((frames > 0) & (frames < 255)).mean() > 0.3
    assert np.abs(found.frames - frames).max() <= 0.51  # rounded
    options = ("--seed", SEED, "--steps", STEPS, "--frames", FRAMES, "--size", f"{SIZE[0]}x{SIZE[1]}")
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLWan(**made.vae_config(made.VAE22))
    exact = counted(lambda: vae.decode(torch.empty(1, 48, 2, 4, 4, device="meta")))
    # Once per graph, the mean of the latents through conv2: an engine folds it when it loads the graph.
    assert (
        estimate(whole, width=SIZE[0], height=SIZE[1], frames=FRAMES).stages["decoder"].flops == exact + 2 * 2 * 48**2
    )
    in_c = in_cpp(tmp_path / "v.rgb", PROMPT, engine, *options, bundle=whole.folder)
    np.testing.assert_array_equal(in_c.reshape(found.frames.shape), found.frames)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_frames_behind_a_picture_are_those_of_diffusers_and_in_cpp_the_same(
    engine: str, whole: Bundle, folder: Path, embeds: list[torch.Tensor], picture: np.ndarray, tmp_path: Path
) -> None:
    pytest.importorskip(engine)
    frames = 255 * image_to_video(folder, embeds, picture, "np")[0]
    with tmd_runtime.load(whole.folder, engine=engine, threads=1) as pipeline:
        found = pipeline(PROMPT, seed=SEED, steps=STEPS, frames=LONGER, size=WIDER, image=picture)
    assert found.frames.shape == frames.shape == (LONGER, WIDER[1], WIDER[0], 3)
    assert np.abs(found.frames - frames).max() <= 0.51  # rounded
    (tmp_path / "first.ppm").write_bytes(b"P6\n%d %d\n255\n" % WIDER + picture.tobytes())
    options = ("--seed", SEED, "--steps", STEPS, "--frames", LONGER, "--size", f"{WIDER[0]}x{WIDER[1]}")
    words = (*options, "--image", tmp_path / "first.ppm")
    in_c = in_cpp(tmp_path / "v.rgb", PROMPT, engine, *words, bundle=whole.folder)
    np.testing.assert_array_equal(in_c.reshape(found.frames.shape), found.frames)


def test_a_call_written_for_diffusers_gives_its_latents(
    bundle: Bundle, embeds: list[torch.Tensor], expected: tuple
) -> None:
    """The same words that `expected` was made with, but for the length of prompts, which is in the bundle."""
    pipe = TmdPipeline.from_pretrained(bundle.folder, engine="onnxruntime", threads=1)
    found = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        guidance_scale=5.0,
        height=SIZE[1],
        width=SIZE[0],
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames
    check_latents(found, expected[0])
