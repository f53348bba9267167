"""A picture that is held as the first frame of a video: its latents to the last bit, and what each rule makes of the
rest."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from PIL import Image

import tmd_runtime
from tests.helpers.synthetic import GRAPHS, velocity_sampler, write_synthetic_bundle
from tmd_engines.cost.sizing import estimate
from tmd_runtime import NoiseStream, RuntimeFailure, UsageFailure
from tmd_runtime.command.cli import command
from tmd_runtime.files.tensor_files import Latents, save_latents
from tmd_runtime.pipeline import Pipeline
from tmd_runtime.sampling.schedule import rope_tables, told_time

PROMPT, SIZE, FRAMES, SHAPE = "a red circle moving right", (48, 32), 9, (1, 16, 3, 4, 6)
PICTURE = np.random.default_rng(3).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)
SAMPLERS = {
    "unipc": velocity_sampler(rule="unipc", steps=4, guidance=3.0, negative_prompt="a blue square"),
    "renoise": velocity_sampler(
        rule="renoise", steps=3, allowed_steps=[3], times=[1.0, 0.757, 0.522], time_rounding="nearest"
    ),
    "euler": velocity_sampler(rule="euler", steps=2, allowed_steps=[2], times=[1.0, 0.8333], time_rounding="none"),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, graphs = tmp_path_factory.mktemp("held"), ("encoder", *GRAPHS)
    held = {name: write_synthetic_bundle(folder / name, graphs, each, holds=True) for name, each in SAMPLERS.items()}
    return held | {"plain": write_synthetic_bundle(folder / "plain", sampler=SAMPLERS["unipc"])}


@pytest.fixture(scope="module")
def pipeline(bundles: dict[str, Path]) -> Pipeline:
    return tmd_runtime.load(bundles["unipc"], engine="onnxruntime", threads=1)


class Plain:
    """Both graphs of a model in onnx's own numpy evaluator."""

    def __init__(self, folder: Path, first: NDArray[Any]) -> None:
        names = ("backbone", "flow_head")
        self.graphs = {name: ReferenceEvaluator(onnx.load(folder / f"{name}.onnx")) for name in names}
        self.first = first

    def put(self, x: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([self.first, x[:, :, 1:]], 2)

    def velocity(self, x: NDArray[Any], t: float, prompt_embeds: NDArray[Any]) -> NDArray[Any]:
        _, _, frames, height, width = x.shape
        cos, sin = rope_tables(frames, height // 2, width // 2, 16)
        held = np.eye(1, frames, dtype=np.float32)[0]
        given: Any = {
            "x": x.astype(np.float32),
            "t": np.array([t], np.float32),
            "rope_cos": cos,
            "rope_sin": sin,
            "held": held,
        }
        features, context = self.graphs["backbone"].run(None, {**given, "prompt_embeds": prompt_embeds})
        (found,) = self.graphs["flow_head"].run(None, {**given, "features": features, "context": context})
        return np.asarray(found)


@pytest.mark.parametrize("rule", ["renoise", "euler"])
def test_the_rest_of_the_video_equals_the_formula(bundles: dict[str, Path], rule: str) -> None:
    """x0, then fresh noise, or a step of Euler; the first frame is put back before every evaluation and at the end."""
    with tmd_runtime.load(bundles[rule], threads=1) as pipeline:
        embeds, first = pipeline.encode(PROMPT), pipeline.encode_image(PICTURE, SIZE)
        found = pipeline.denoise(embeds, seed=7, frames=FRAMES, init_latents=first)
    sampler, stream, model = SAMPLERS[rule], NoiseStream(7), Plain(bundles[rule], first)
    x = model.put(stream.normal(SHAPE).astype(np.float64))
    for t, after in pairwise([*sampler["times"], 0.0]):
        v = model.velocity(x, told_time(t, sampler["time_rounding"]), embeds)
        if rule == "euler":
            x = model.put(x + (after - t) * v)
        else:
            x = model.put((1 - after) * (x - t * v) + (after * stream.normal(SHAPE) if after else 0))
    np.testing.assert_allclose(found, x, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found[:, :, :1], first)


@pytest.mark.parametrize("rule", SAMPLERS)
def test_the_first_frame_is_held_and_the_next_run_holds_none(bundles: dict[str, Path], rule: str) -> None:
    wishes: dict[str, Any] = {"seed": 7, "frames": FRAMES, "size": SIZE}
    with tmd_runtime.load(bundles[rule], threads=1) as pipeline:
        before = pipeline(PROMPT, **wishes).latents
        seen: list[NDArray[np.uint8]] = []
        made = pipeline(PROMPT, image=PICTURE, on_preview=seen.append, **wishes)
        after = pipeline(PROMPT, **wishes).latents
        first = pipeline.encode_image(PICTURE, SIZE)
        assert made.latents is not None and before is not None and after is not None
        np.testing.assert_array_equal(made.latents[:, :, :1], first)
        np.testing.assert_array_equal(after, before)
        assert np.abs(made.latents - before)[:, :, 1:].max() > 1e-3, "the picture plays a part"
        expected = pipeline.decode(first)[0]
        for video in (*seen, made.frames):
            np.testing.assert_array_equal(video[0], expected)
        again = pipeline(PROMPT, init_latents=first, **wishes)
        np.testing.assert_array_equal(again.frames, made.frames)
        assert made.stage_seconds["encode"] > 0 and "encode" not in again.stage_seconds


def test_without_a_picture_the_video_is_that_of_graphs_that_hold_none(bundles: dict[str, Path]) -> None:
    videos = []
    for name in ("unipc", "plain"):
        with tmd_runtime.load(bundles[name], engine="onnxruntime", threads=1) as pipeline:
            videos.append(pipeline(PROMPT, seed=3, frames=FRAMES, size=SIZE).frames)
    np.testing.assert_array_equal(videos[0], videos[1])


def test_nan_is_not_covered_up_by_the_picture(pipeline: Pipeline) -> None:
    wishes: Any = {"seed": 7, "frames": FRAMES, "size": SIZE}
    with pytest.raises(RuntimeFailure, match="NaN or Inf"):
        pipeline.denoise(np.full((1, 32, 64), np.nan, np.float32), guidance=1.0, **wishes)
    first = pipeline.encode_image(PICTURE, SIZE)
    found = pipeline.denoise(pipeline.encode(PROMPT), guidance=1.0, init_latents=first, **wishes)
    assert np.isfinite(found).all(), "the run after a failed one starts from clean buffers"


def test_what_cannot_be_is_said_in_a_sentence(pipeline: Pipeline, bundles: dict[str, Path], tmp_path: Path) -> None:
    first = pipeline.encode_image(PICTURE, SIZE)
    clip = np.zeros(SHAPE, np.float32)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": PICTURE, "strength": 0.5}, "first frame, unchanged: leave the strength out"),
        ({"strength": 0.5}, "first frame, unchanged: leave the strength out"),
        ({"image": PICTURE, "frames": 1}, "choose more frames"),
        ({"image": PICTURE, "init_latents": first}, "give the image or its latents, not both"),
        ({"image": PICTURE.astype(float)}, r"must be uint8 \[height, width, 3\], not float64"),
        ({"image": PICTURE[..., 0]}, r"not uint8 \[32, 48\]"),
        ({"init_latents": clip}, r"latents are \[1, 16, 3, 4, 6\], and this run takes \[1, 16, 1, 4, 6\]"),
        ({"init_latents": np.full_like(first, np.nan)}, "latents hold NaN or Inf: encode the picture again"),
        ({"init_latents": first, "size": (64, 64)}, r"this run takes \[1, 16, 1, 8, 8\]"),
        ({"image": PICTURE, "rho": 0.5}, "rho is for Transition Models"),
    ]
    for given, message in cases:
        with pytest.raises(UsageFailure, match=message):
            pipeline(PROMPT, **{"frames": FRAMES, **given})
    with tmd_runtime.load(bundles["plain"], threads=1) as plain:
        some: list[dict[str, Any]] = [{"image": PICTURE}, {"init_latents": first}, {"strength": 0.5}]
        for given in some:
            with pytest.raises(UsageFailure, match="This model does neither"):
                plain(PROMPT, frames=FRAMES, **given)
    blind = write_synthetic_bundle(tmp_path / "blind", GRAPHS, SAMPLERS["euler"], holds=True)
    with (
        tmd_runtime.load(blind, threads=1) as without,
        pytest.raises(RuntimeFailure, match=r"no graph encoder.*--init-latents"),
    ):
        without(PROMPT, image=PICTURE, frames=FRAMES)


def test_an_estimate_counts_the_encoder_where_there_is_a_picture(pipeline: Pipeline) -> None:
    sizes: Any = {"width": 64, "height": 64, "frames": 5}
    assert "encoder" not in estimate(pipeline.bundle, **sizes).stages
    assert estimate(pipeline.bundle, **sizes, from_picture=True).stages["encoder"].calls == 1
    settings = pipeline.settings(frames=5, size=(64, 64))
    forecast: Any = pipeline.forecast
    assert forecast._flops(settings, True) > forecast._flops(settings, False)


def test_the_command_line_takes_a_file(bundles: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("in.png")
    Path("text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(Path("in.png").read_bytes()[:200])

    def run(*words: str) -> Result:
        options = (
            "--prompt",
            PROMPT,
            "--seed",
            "7",
            "--frames",
            "5",
            "--out",
            "v.mp4",
            "--bundle",
            str(bundles["unipc"]),
        )
        return CliRunner().invoke(command, [*options, *words], catch_exceptions=False)

    done = run("--image", "in.png", "--save-latents", "v.safetensors", "--json")
    document = json.loads(done.stdout)
    assert (document["width"], document["height"]) == (80, 48), "its own shape, with about as many pixels"
    assert document["stage_seconds"]["encode"] > 0 and Path("v.mp4").stat().st_size > 0
    first = tmd_runtime.load(bundles["unipc"], threads=1).encode_image(PICTURE, (80, 48))
    save_latents("first.safetensors", Latents(first, "m", "p", 0, 1, 1, 1.0, "euler", 1.0, (80, 48)))
    again = run("--init-latents", "first.safetensors", "--save-latents", "w.safetensors")
    assert again.exit_code == 0 and Path("v.safetensors").read_bytes() == Path("w.safetensors").read_bytes()
    for words, code, message in (
        (("--image", "in.png", "--strength", "0.5"), 2, "leave the strength out"),
        (("--image", "in.png", "--frames", "1"), 2, "choose more frames"),
        (("--image", "no.png"), 1, "no.png does not exist: name a picture"),
        (("--image", "text.png"), 1, "text.png is no picture that can be read here"),
        (("--image", "cut.png"), 1, "cut.png is damaged"),
        (("--init-latents", "v.safetensors"), 2, "and this run takes [1, 16, 1, 6, 10]"),
        (("--image", "in.png", "--size", "50x64"), 2, "a width of 50 pixels cannot be made"),
    ):
        failed = run(*words)
        assert failed.exit_code == code and message in " ".join(failed.stderr.split()), failed.stderr
