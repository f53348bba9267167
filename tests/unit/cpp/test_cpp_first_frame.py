"""The C++ library holds a picture as the first frame of a video as Python does, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tmd_runtime
from tests.helpers.cpp_tools import USAGE, ask_bundle, engine_options, pixels
from tests.helpers.synthetic import GRAPHS, velocity_sampler, write_synthetic_bundle

PROMPT, SIZE, FRAMES = "a red circle moving right", (48, 32), 9
SAMPLERS = {
    "unipc": velocity_sampler(rule="unipc", steps=4, guidance=3.0, negative_prompt="a blue square"),
    "renoise": velocity_sampler(
        rule="renoise", steps=3, allowed_steps=[3], times=[1.0, 0.757, 0.522], time_rounding="nearest"
    ),
    "euler": velocity_sampler(rule="euler", steps=2, init_scale=0.9),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, graphs = tmp_path_factory.mktemp("held"), ("encoder", *GRAPHS)
    return {name: write_synthetic_bundle(folder / name, graphs, each, holds=True) for name, each in SAMPLERS.items()}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    engine_options(request.param)
    return str(request.param)


@pytest.fixture(scope="module")
def pipelines(bundles: dict[str, Path], engine: str) -> Iterator[dict[str, tmd_runtime.Pipeline]]:
    loaded = {name: tmd_runtime.load(path, engine=engine, threads=1) for name, path in bundles.items()}
    yield loaded
    for pipeline in loaded.values():
        pipeline.close()


def picture(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)


@pytest.mark.parametrize("name", SAMPLERS)
def test_videos_and_previews_from_a_picture_are_bit_equal(
    bundles: dict[str, Path], pipelines: dict[str, tmd_runtime.Pipeline], engine: str, name: str
) -> None:
    """With the picture, then without: a run leaves nothing to the next one."""
    image, seen = picture(SIZE), list[NDArray[np.uint8]]()
    asked = {"rgb": image.tobytes().hex(), "width": SIZE[0], "height": SIZE[1]}
    first = ask_bundle("encode_image", bundles[name], engine, **asked)["ok"]
    wishes = {"seed": 5, "frames": FRAMES, "width": SIZE[0], "height": SIZE[1]}
    for init in (first, None):
        seen.clear()
        given: Any = {} if init is None else {"image": image}
        expected = pipelines[name](PROMPT, seed=5, frames=FRAMES, size=SIZE, on_preview=seen.append, **given)
        wished = wishes | ({} if init is None else {"init_latents": init})
        found = ask_bundle("run", bundles[name], engine, prompt=PROMPT, wishes=wished, previews=True)
        assert "ok" in found, found
        assert expected.frames.std() > 1, "a picture, not a flat colour"
        np.testing.assert_array_equal(pixels(found["ok"], expected.frames.shape), expected.frames)
        assert len(found["previews"]) == len(seen) == expected.steps - 1
        for have, want in zip(found["previews"], seen, strict=True):
            np.testing.assert_array_equal(pixels(have, want.shape), want)
            if init is not None:
                np.testing.assert_array_equal(want[0], expected.frames[0])


def test_a_large_picture_is_encoded_as_a_whole(
    bundles: dict[str, Path], pipelines: dict[str, tmd_runtime.Pipeline], engine: str
) -> None:
    """One frame of a video is no still, which would be taken in tiles."""
    size = (1280, 16)
    image = picture(size)
    asked = {"rgb": image.tobytes().hex(), "width": size[0], "height": size[1]}
    expected = pipelines["euler"].encode_image(image, size)
    assert expected.shape == (1, 16, 1, 2, 160)
    assert ask_bundle("encode_image", bundles["euler"], engine, **asked)["ok"] == expected.tobytes().hex()


def test_what_cannot_be_done_is_refused_and_what_can_is_described(
    bundles: dict[str, Path], engine: str, tmp_path: Path
) -> None:
    latents = np.zeros((16, 4, 6), np.float32).tobytes().hex()
    wishes = {"seed": 5, "frames": FRAMES, "width": SIZE[0], "height": SIZE[1], "init_latents": latents}
    bad = np.full((16, 4, 6), np.nan, np.float32).tobytes().hex()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"strength": 0.5}, "leave the strength out"),
        ({"frames": 1}, "choose more frames"),
        ({"init_latents": bad}, "hold NaN or Inf"),
    ]
    for changes, said in refused:
        answer = ask_bundle("run", bundles["euler"], engine, prompt=PROMPT, wishes=wishes | changes)
        assert answer["status"] == USAGE and said in answer["error"]
    plain = write_synthetic_bundle(tmp_path / "plain", sampler=SAMPLERS["euler"])
    answer = ask_bundle("run", plain, engine, prompt=PROMPT, wishes=wishes)
    assert answer["status"] == USAGE and "This model does neither" in answer["error"]
    for bundle, first in ((bundles["euler"], 1), (plain, 0)):
        assert ask_bundle("describe", bundle, engine)["ok"]["first_frame"] == first
