"""A call that was written for diffusers' WanPipeline works on a bundle, without torch; what cannot work says so."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tmd_runtime
from tests.helpers.synthetic import GRAPHS, velocity_sampler, write_synthetic_bundle
from tmd_runtime import Cancelled, UsageFailure
from tmd_runtime.compat.diffusers import TmdPipeline, TmdPipelineOutput

PROMPT = "a red circle moving right on a black background"
SMALL: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 5}


@pytest.fixture(scope="module")
def pipe() -> Iterator[TmdPipeline]:
    found = TmdPipeline.from_bundle()
    yield found
    found.pipeline.close()


@pytest.fixture(scope="module")
def ours() -> np.ndarray:
    with tmd_runtime.load() as pipeline:
        return pipeline(PROMPT, seed=7, steps=2, frames=5, size=(48, 32)).frames


def test_every_argument_of_diffusers_has_its_place() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = list(inspect.signature(diffusers.WanPipeline.__call__).parameters)
    mine = list(inspect.signature(TmdPipeline.__call__).parameters)
    assert mine[: len(theirs)] == theirs, "in their order, so that a call without names means the same"


def test_a_call_of_diffusers_gives_our_frames_in_their_shape(pipe: TmdPipeline, ours: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    output = pipe(
        prompt=PROMPT,
        negative_prompt="worst quality",  # without guidance nobody reads it
        **SMALL,
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
        max_sequence_length=pipe.pipeline.manifest.text.max_length,
        callback_on_step_end=None,
        callback_on_step_end_tensor_inputs=["latents"],
        output_type="np",
    )
    assert isinstance(output, TmdPipelineOutput)
    assert output.frames.shape == (1, 5, 32, 48, 3) and output.frames.dtype == np.float32
    assert np.array_equal(np.round(255 * output.frames[0]).astype(np.uint8), ours)
    assert output[0] is output.frames is output["frames"]
    (frames,) = pipe(PROMPT, **SMALL, num_inference_steps=2, generator=7, return_dict=False)
    assert np.array_equal(frames, output.frames)


def test_pictures_and_latents(pipe: TmdPipeline, ours: np.ndarray) -> None:
    (pictures,) = pipe(PROMPT, **SMALL, num_inference_steps=2, generator=7, output_type="pil").frames
    assert [picture.size for picture in pictures] == [(48, 32)] * 5
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), ours)
    latents = pipe(PROMPT, **SMALL, num_inference_steps=2, generator=7, output_type="latent").frames
    assert np.array_equal(pipe.pipeline.decode(latents), ours)


def test_several_videos_have_a_generator_each(pipe: TmdPipeline, ours: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 7, 9)]
    frames = pipe([PROMPT, "a blue star"], **SMALL, num_videos_per_prompt=2, generator=generators).frames
    assert frames.shape == (4, 5, 32, 48, 3)
    assert np.array_equal(np.round(255 * frames[0]), ours)
    assert not np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[0], frames[2])


def test_embeddings_take_the_place_of_a_prompt(pipe: TmdPipeline, ours: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    embeds = pipe.pipeline.encode(PROMPT)
    for given in (embeds, torch.from_numpy(embeds)):
        frames = pipe(prompt_embeds=given, **SMALL, generator=7).frames
        assert np.array_equal(np.round(255 * frames[0]), ours)


def test_the_callback_is_called_after_each_outer_step_and_can_stop(pipe: TmdPipeline) -> None:
    seen: list[tuple[int, object]] = []

    def note(pipeline: TmdPipeline, step: int, timestep: float | None, tensors: dict[str, Any]) -> dict[str, Any]:
        assert pipeline is pipe
        seen.append((step, timestep))
        return tensors

    pipe(PROMPT, **SMALL, num_inference_steps=2, generator=7, callback_on_step_end=note)
    assert seen == [(0, None), (1, None)], "a student of two steps, whose times are its own"

    def stop(pipeline: TmdPipeline, step: int, *_: object) -> None:
        pipeline._interrupt = True

    with pytest.raises(Cancelled):
        pipe(PROMPT, **SMALL, generator=7, callback_on_step_end=stop)

    def change(pipeline: TmdPipeline, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 2 * tensors["latents"]}

    with pytest.raises(UsageFailure, match="latents stays on the device during a run"):
        pipe(PROMPT, **SMALL, generator=7, callback_on_step_end=change)


def test_timesteps_are_those_of_diffusers_scale() -> None:
    seen: list[Any] = []
    with tmd_runtime.load("builtin:tim-tiny") as pipeline:
        TmdPipeline(pipeline)(PROMPT, num_inference_steps=4, callback_on_step_end=lambda *step: seen.append(step[2]))
    assert len(seen) == 4 and seen[0] == 1000 and all(a > b > 0 for a, b in pairwise(seen))


def test_a_picture_is_held_as_in_its_pipeline_for_pictures(tmp_path: Path) -> None:
    from PIL import Image

    sampler = velocity_sampler(rule="euler", steps=2, allowed_steps=[2], times=[1.0, 0.8], time_rounding="none")
    bundle = write_synthetic_bundle(tmp_path / "holds", ("encoder", *GRAPHS), sampler, holds=True)
    picture = np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8)
    pipe = TmdPipeline.from_bundle(bundle)
    frames = pipe(image=Image.fromarray(picture), prompt=PROMPT, **SMALL, generator=7).frames
    expected = pipe.pipeline(PROMPT, seed=7, frames=5, size=(48, 32), image=picture).frames
    assert np.array_equal(np.round(255 * frames[0]).astype(np.uint8), expected)
    with pytest.raises(UsageFailure, match="has no argument 'last_image'"):
        pipe(image=picture, prompt=PROMPT, last_image=picture)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"num_inference_step": 2}, "has no argument 'num_inference_step': it takes prompt, negative_prompt, height"),
        ({"output_type": "pt"}, "there is no torch in this runtime: take output_type='np'"),
        ({"output_type": "gif"}, "choose one of np, pil, latent"),
        ({"latents": np.zeros(1)}, "the noise comes from a seed: give a generator"),
        ({"attention_kwargs": {}}, "attention_kwargs cannot be chosen here"),
        ({"guidance_scale": 5.0}, "it was trained without"),
        ({"num_frames": 80}, "80 frames cannot be made: choose 1 plus a multiple of 4, such as 77 or 81"),
        ({"height": 481}, "a height of 481 pixels cannot be made"),
        ({"num_inference_steps": 50}, "does not do 50 steps"),
        ({"generator": "seven"}, "a generator is a seed or a torch.Generator, not a str"),
        ({"generator": [1, 2]}, "there are 1 videos and 2 generators: give a list of 1"),
        ({"prompt": None}, "there is no prompt"),
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": 5}, "prompt must be a text or a list of texts, not a int"),
        ({"prompt": [PROMPT, None]}, "prompt must be a text or a list of texts, not a NoneType"),
        ({"negative_prompt": ["a", "b"]}, "there are 1 prompts and 2 negative prompts"),
        ({"negative_prompt": []}, "there are 1 prompts and 0 negative prompts"),
        ({"num_videos_per_prompt": 0}, "0 videos for each prompt cannot be made"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"prompt_embeds": np.zeros((1, 4, 8))}, "two prompts: give one of them"),
        ({"prompt": None, "prompt_embeds": np.zeros(3)}, r"prompt_embeds must be numbers \[videos, text, width\]"),
        ({"max_sequence_length": 7}, "this bundle reads prompts of"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "a callback gets no tensors here"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(pipe: TmdPipeline, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageFailure, match=message):
        pipe(**{"prompt": PROMPT, **more})


def test_a_generator_whose_noise_is_not_ours_is_refused(pipe: TmdPipeline) -> None:
    torch = pytest.importorskip("torch")
    drawn = torch.Generator().manual_seed(7)
    torch.randn(1, generator=drawn)
    with pytest.raises(UsageFailure, match="has drawn before"):
        pipe(prompt=PROMPT, generator=drawn)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {}, "tmd-export --checkpoint hf:Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("builtin:tiny", {"torch_dtype": "bfloat16"}, "leave torch_dtype out; tmd-export --precision"),
        ("builtin:tiny", {"vae": None}, "has no argument 'vae'"),
        ("builtin:none", {}, "there is no built-in bundle 'none'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_a_sentence(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageFailure, match=message):
        TmdPipeline.from_pretrained(name, **options)


def test_the_device_and_the_memory_can_be_chosen_as_there(ours: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    pipe = TmdPipeline.from_pretrained("builtin:tiny").to(torch.device("cpu"))
    pipe.enable_model_cpu_offload()
    frames = pipe(PROMPT, **SMALL, num_inference_steps=2, generator=7).frames
    assert np.array_equal(np.round(255 * frames[0]), ours)
    with pytest.raises(UsageFailure):
        pipe.to("tpu")


def test_it_works_without_torch_and_diffusers(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["torch"] = sys.modules["diffusers"] = None
from tmd_runtime.compat.diffusers import TmdPipeline
print(TmdPipeline.from_bundle()("a red circle", height=32, width=32, num_frames=1, generator=7).frames.shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "(1, 1, 32, 32, 3)\n"
