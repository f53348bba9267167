"""The C++ library runs flow maps as Python does, bit for bit: steps, schedules, guidance, previews, deadlines."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tmd_runtime
from tests.helpers.cpp_tools import USAGE, engine_options, onnxruntime_library, twin
from tests.helpers.synthetic import flow_map_sampler, write_synthetic_bundle

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic_bundle(tmp_path_factory.mktemp("flow_map") / "b", sampler=flow_map_sampler())


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request: pytest.FixtureRequest) -> str:
    engine_options(request.param)
    return str(request.param)


def ask(bundle: Path, engine: str, **more: Any) -> dict[str, Any]:
    library = str(onnxruntime_library()) if engine == "onnxruntime" else ""
    return twin().ask("run", bundle=str(bundle), engine=engine, library=library, prompt=PROMPT, **more)


def pixels(hexed: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(hexed), np.uint8).reshape(shape)


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"steps": 1},
        {"steps": 7, "shift": 2.5},
        {"schedule": [1.0, 0.7, 0.1, 0.0]},
        {"guidance": 3.0, "negative_prompt": "a blue square"},
        {"guidance": 3.0, "negative_prompt": "blue " * 99},
    ],
    ids=str,
)
def test_videos_and_previews_are_bit_equal(bundle: Path, engine: str, wishes: dict[str, Any]) -> None:
    seen: list[NDArray[np.uint8]] = []
    with tmd_runtime.load(bundle, engine=engine, threads=1) as pipeline:
        expected = pipeline(PROMPT, seed=5, frames=5, on_preview=seen.append, **wishes)
    found = ask(bundle, engine, wishes={"seed": 5, "frames": 5, **wishes}, previews=True)
    assert "ok" in found, found
    assert expected.frames.std() > 1, "a picture, not a flat colour"
    np.testing.assert_array_equal(pixels(found["ok"], expected.frames.shape), expected.frames)
    assert tuple(found["times"]) == expected.times and found["steps"] == expected.steps == len(expected.times) - 1
    assert found["warnings"].splitlines() == list(expected.warnings)
    assert len(found["previews"]) == len(seen) == expected.steps - 1
    for one, wanted in zip(found["previews"], seen, strict=True):
        np.testing.assert_array_equal(pixels(one, wanted.shape), wanted)


def test_a_deadline_decides_and_its_way_can_be_repeated(bundle: Path, engine: str) -> None:
    short = ask(bundle, engine, wishes={"seed": 5, "deadline": 1e-5})
    assert short["times"] == [1.0, 0.0] and short["steps"] == 1
    long = ask(bundle, engine, wishes={"seed": 5, "deadline": 1000.0, "steps": 4})
    assert long["times"] == [5 * t / (1 + 4 * t) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    again = ask(bundle, engine, wishes={"seed": 5, "schedule": long["times"]})
    assert again["ok"] == long["ok"] == ask(bundle, engine, wishes={"seed": 5, "steps": 4})["ok"]
    for answer in (short, long):
        assert answer["fractions"][-1] == 1 and all(before <= after for before, after in pairwise(answer["fractions"]))


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"rho": 0.5}, "rho is for Transition Models"),
        ({"inner_steps": 2}, "no inner steps"),
        ({"shift": 0.5}, "shift"),
        ({"shift": 3.0, "schedule": [1.0, 0.0]}, "a shift has nothing to warp"),
        ({"schedule": [1.0, 0.5]}, "must fall from 1 (noise) to 0 (the video)"),
        ({"schedule": [1.0]}, "must fall from 1 (noise) to 0 (the video)"),
        ({"schedule": [1.0, 0.0], "steps": 2}, "leave the steps out"),
        ({"deadline": 0.0}, "deadline"),
        ({"steps": 1001}, "1001 steps cannot be done"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_in_both(bundle: Path, wishes: dict[str, Any], words: str) -> None:
    answer = ask(bundle, "onnxruntime", wishes=wishes)
    assert answer.get("status") == USAGE and words in answer["error"], answer
    with pytest.raises(tmd_runtime.UsageFailure, match=words.replace("(", r"\(").replace(")", r"\)")):
        tmd_runtime.load(bundle, threads=1).settings(**wishes)


def test_a_deadline_in_python_is_kept_to_its_way(bundle: Path) -> None:
    """Two runs: the second one knows what a step costs."""
    with tmd_runtime.load(bundle, threads=1) as pipeline:
        for _ in range(2):
            short = pipeline(PROMPT, seed=5, deadline=1e-5)
            assert (short.times, short.steps, short.nfe) == ((1.0, 0.0), 1, 1.0)
        long = pipeline(PROMPT, seed=5, deadline=1000.0, steps=4, guidance=2.0)
        assert (long.steps, long.nfe) == (4, 8.0)
        again = pipeline(PROMPT, seed=5, schedule=long.times, guidance=2.0)
    assert np.array_equal(again.frames, long.frames)
