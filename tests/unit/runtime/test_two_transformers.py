"""Models of two transformers that take turns (Wan2.2-A14B): who makes which step, guidance, memory, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import tmd_engines
import tmd_runtime
from tests.helpers.synthetic import GRAPHS, SECOND, velocity_sampler, write_synthetic_bundle
from tmd_engines import BundleError
from tmd_engines.bundle.families.wan import WAN, WanSampler
from tmd_engines.command.cli import main as tmd_engine
from tmd_engines.cost.sizing import BASE_BYTES, estimate
from tmd_runtime import RuntimeFailure, StepInfo
from tmd_runtime.memory import DENOISER
from tmd_runtime.sampling import schedule

PROMPT = "a red circle moving right"
SIZE: dict[str, Any] = {"frames": 5, "size": (48, 32)}
TIMES = [1.0, 0.9375, 0.8333, 0.625]
EULER = velocity_sampler(rule="euler", steps=4, allowed_steps=[2, 4], times=TIMES, time_rounding="none", boundary=0.875)
GUIDED = velocity_sampler(steps=6, guidance=4.0, guidance_2=3.0, negative_prompt="a blue square", boundary=0.875)


def made(folder: Path, sampler: dict[str, Any], graphs: tuple[str, ...] = (*GRAPHS, *SECOND)) -> Path:
    return write_synthetic_bundle(folder, graphs, sampler)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("two")
    return {"euler": made(folder / "euler", EULER), "guided": made(folder / "guided", GUIDED)}


class Velocity:
    """One of the two transformers of a bundle, engine by engine."""

    def __init__(self, bundle: Path, suffix: str) -> None:
        opened = tmd_engines.Bundle.open(bundle)
        self._backbone, self._head = (
            tmd_engines.load(opened, f"{name}{suffix}", threads=1) for name in ("backbone", "flow_head")
        )

    def __call__(self, x: np.ndarray, t: float, prompt_embeds: np.ndarray) -> np.ndarray:
        _, _, frames, height, width = x.shape
        dims = {"batch": 1, "frames": frames, "height": height, "width": width, "text": prompt_embeds.shape[1]}
        dims["tokens"] = frames * height * width // 4
        cos, sin = schedule.rope_tables(frames, height // 2, width // 2, 16)
        given = {"x": x, "t": np.array([t], np.float32), "rope_cos": cos, "rope_sin": sin}
        passed = {name: self._backbone.empty(name, **dims) for name in ("features", "context")}
        self._backbone.run({**given, "prompt_embeds": prompt_embeds}, passed)
        found = self._head.empty("velocity", **dims)
        self._head.run({**given, **passed}, {"velocity": found})
        return np.asarray(found)


@pytest.mark.parametrize("steps", [4, 2])
def test_steps_from_the_boundary_on_are_the_second_ones(bundles: dict[str, Path], steps: int) -> None:
    """Two of four steps each; with two, the first transformer makes both, though the second begins at 0."""
    pipeline = tmd_runtime.load(bundles["euler"], threads=1)
    result = pipeline(PROMPT, seed=3, steps=steps, **SIZE)
    high, low = (Velocity(bundles["euler"], suffix) for suffix in ("", "_2"))
    embeds = pipeline.encode(PROMPT)
    x: Any = tmd_runtime.NoiseStream(3).normal((1, 16, 2, 4, 6))
    times = [*TIMES[:steps], 0.0]
    for t, after in pairwise(times):
        x = x - np.float32(t - after) * (high if t >= 0.875 else low)(x, t, embeds)
    assert result.latents is not None
    np.testing.assert_allclose(result.latents, x, atol=1e-5)
    assert np.abs(result.latents).max() > 0.5


def test_memory_decides_what_is_loaded_and_not_what_comes_out(bundles: dict[str, Path]) -> None:
    """Guided UniPC: its history goes from one transformer to the other."""
    results, loaded = dict[str, Any](), dict[str, list[set[str]]]()
    for memory in ("all", "low"):
        pipeline = tmd_runtime.load(bundles["guided"], threads=1, memory=memory)
        seen: list[set[str]] = []

        def watch(_: StepInfo, names: Any = pipeline._graphs.shared.names, seen: list[set[str]] = seen) -> None:
            seen.append(names())

        results[memory] = pipeline(PROMPT, seed=1, callback=watch, **SIZE)
        loaded[memory] = [names & {*DENOISER, *SECOND} for names in seen]
        again: Any = pipeline(PROMPT, seed=1, **SIZE)
        assert np.array_equal(again.latents, results[memory].latents)
    assert np.array_equal(results["all"].latents, results["low"].latents)
    assert any(set(DENOISER) | set(SECOND) <= names for names in loaded["all"])
    assert {"update", *SECOND} in loaded["low"] and set(DENOISER) in loaded["low"]
    assert not any("backbone" in names and names & set(SECOND) for names in loaded["low"][:-1] if len(names) > 3)
    assert results["all"].nfe == 12


def test_each_transformer_has_its_guidance(bundles: dict[str, Path], tmp_path: Path) -> None:
    latents = dict[str, Any]()
    for name, high, low in (("both", 4.0, 3.0), ("swapped", 3.0, 4.0), ("same", 4.0, None)):
        folder = made(tmp_path / name, {**GUIDED, "guidance": high, "guidance_2": low})
        pipeline = tmd_runtime.load(folder, threads=1)
        latents[name] = pipeline(PROMPT, seed=1, **SIZE).latents
        if name == "same":
            wished: Any = tmd_runtime.load(bundles["guided"], threads=1)(PROMPT, seed=1, guidance=4.0, **SIZE)
            assert np.array_equal(wished.latents, latents["same"]), "a wish is for both"
    assert not np.allclose(latents["both"], latents["swapped"]) and not np.allclose(latents["both"], latents["same"])


def test_a_guidance_that_is_left_out_is_the_first_ones(tmp_path: Path) -> None:
    made(tmp_path / "none", {**GUIDED, "guidance_2": None})
    settings: Any = tmd_runtime.load(tmp_path / "none").settings(**SIZE)
    assert settings.guidance == settings.guidance_2 == 4.0


def test_the_need_for_memory_knows_that_they_take_turns(bundles: dict[str, Path], tmp_path: Path) -> None:
    one = made(tmp_path / "one", velocity_sampler(), GRAPHS)
    need, alone = (
        estimate(tmd_engines.Bundle.open(folder), width=48, height=32, frames=5, steps=3)
        for folder in (bundles["guided"], one)
    )
    assert need.peak("low") == alone.peak("low")
    turn = replace(need, stages={name: need.stages[name] for name in (*SECOND, "update")})
    assert turn.peak("low") == BASE_BYTES + sum(stage.total_bytes for stage in turn.stages.values())
    assert [need.stages[name].total_bytes for name in SECOND] == [
        need.stages[name].total_bytes for name in DENOISER[:2]
    ]
    assert need.peak("all") == alone.peak("all") + sum(need.stages[name].total_bytes for name in SECOND)
    assert need.flops == alone.flops, "their calls are counted with those of the first"


def test_a_bundle_that_lacks_the_second_one_stops_with_a_sentence(tmp_path: Path) -> None:
    folder = made(tmp_path / "half", EULER, GRAPHS)
    with pytest.raises(RuntimeFailure, match="no graph backbone_2, so it cannot denoise to the end"):
        tmd_runtime.load(folder, threads=1)(PROMPT, seed=1, **SIZE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"boundary": None}, "needs a sampler.boundary"),
        ({"boundary": 0.0}, "boundary"),
        ({"boundary": 1.5}, "boundary"),
        ({"guidance_2": 3.0}, "must both be 1, or neither"),
    ],
)
def test_samplers_that_contradict_themselves_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=said):
        made(tmp_path / "bad", {**EULER, **changes})


def test_a_second_guidance_needs_a_boundary(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="guidance_2 is for a model with a boundary"):
        made(tmp_path / "bad", velocity_sampler(guidance=4.0, guidance_2=3.0), GRAPHS)


def test_the_sampler_is_described() -> None:
    said = WAN.describe(WanSampler.model_validate_json(json.dumps(GUIDED)))
    assert "guidance 4 and 3, two transformers that change at 0.875" in said


def test_inspect_says_that_the_second_transformer_makes_calls_of_the_first(bundles: dict[str, Path]) -> None:
    shown = CliRunner().invoke(tmd_engine, ["inspect", str(bundles["euler"])])
    lines = [line.split() for line in shown.output.splitlines()]
    calls = {
        words[0]: words[3:5] for words in lines if words and words[0] in ("backbone", "backbone_2") and "M" in words
    }
    assert calls["backbone"][0] == "4" and calls["backbone_2"] == ["of", "backbone"]
