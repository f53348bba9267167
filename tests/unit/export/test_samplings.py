"""What a model is calibrated on: runs of the runtime, whole, with every number of steps that it is made for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tmd_runtime
from tests.helpers.export_tools import small_export
from tests.helpers.synthetic import velocity_sampler, write_synthetic_bundle
from tmd_engines import Bundle, load
from tmd_export.families.tmd import TMD
from tmd_export.families.wan import WAN as WAN_FAMILY
from tmd_export.quantization.observe import Observed
from tmd_export.quantization.samplings import Samplings, few


@pytest.fixture
def samplings() -> Iterator[tuple[Samplings, dict[str, Observed]]]:
    """Of `small_export()`, on graphs that are watched."""
    bundle = small_export().bundle
    graphs = {part: Observed(bundle, part, TMD.products) for part in ("backbone", "flow_head")}
    with load(bundle, "update") as update:
        yield Samplings(bundle.manifest, TMD, {**graphs, "update": update}), graphs


def test_a_sampling_is_a_run_of_the_runtime(samplings: tuple[Samplings, dict[str, Observed]]) -> None:
    runs, graphs = samplings
    calls: list[str] = []
    for part, graph in graphs.items():
        graph.watch = lambda inputs, outputs, part=part: calls.append(part)
    (condition,) = runs.conditions(["unread"], None, 3)
    found = runs.run(condition, 7, 2, 4)
    assert calls == ["backbone", *["flow_head"] * 4] * 2
    with tmd_runtime.load(small_export().bundle, "onnxruntime") as pipeline:
        size: dict[str, Any] = {"frames": 3, "size": (24, 24)}
        expected = pipeline.denoise(condition.prompt, seed=7, steps=2, inner_steps=4, **size)
    assert found.shape == expected.shape == (1, 16, *runs.latents) == (1, 16, 2, 12, 12)
    assert np.abs(found - expected).max() < 1e-4 and found.std() > 0.1


def test_samplings_have_every_number_of_steps_that_a_model_is_made_for(
    samplings: tuple[Samplings, dict[str, Observed]],
) -> None:
    assert samplings[0].counts == [(steps, inner) for steps in (1, 2, 3, 4) for inner in (1, 2, 4)]
    few, any_number = ({"steps": 4, "allowed_steps": allowed} for allowed in ((1, 2), None))
    assert WAN_FAMILY.samplings(SimpleNamespace(**few)) == [(1, 1), (2, 1)]
    assert WAN_FAMILY.samplings(SimpleNamespace(**any_number)) == [(4, 1)]
    assert WAN_FAMILY.samplings(SimpleNamespace(steps=50, allowed_steps=None)) == [(6, 1)]


def test_large_models_have_the_longest_short_sampling_and_the_shortest(
    samplings: tuple[Samplings, dict[str, Observed]],
) -> None:
    assert few(samplings[0].counts) == [(4, 4), (1, 1)]
    assert few([(1, 1), (4, 1), (8, 1), (16, 1)]) == [(4, 1), (1, 1)]
    assert few([(50, 1)]) == [(50, 1)] and few([(3, 1)]) == [(3, 1)]
    assert samplings[0].usual_steps == 2


def test_prompts_become_the_features_that_a_run_makes_of_them() -> None:
    prompts = ("a small red circle moving left on a black background", "a star")
    with tmd_runtime.load() as pipeline:
        expected = [pipeline.encode(prompt) for prompt in prompts]
        found = Samplings(pipeline.manifest, TMD, {}).conditions(prompts, pipeline.bundle, 0)
    for condition, embeds in zip(found, expected, strict=True):
        assert condition.negative is None and np.abs(condition.prompt - embeds).max() < 1e-4


def test_a_model_that_holds_a_picture_is_sampled_with_one_too(tmp_path: Path) -> None:
    """The first frame that came out of the first run; both graphs see it, told time 0."""
    sampler = velocity_sampler(rule="euler", steps=2, guidance=1.0)
    bundle = Bundle.open(write_synthetic_bundle(tmp_path / "b", sampler=sampler, holds=True))
    graphs = {part: Observed(bundle, part, WAN_FAMILY.products) for part in ("backbone", "flow_head")}
    seen: list[tuple[str, np.ndarray, np.ndarray]] = []
    for part, graph in graphs.items():
        graph.watch = lambda given, _, part=part: seen.append((part, given["held"].copy(), given["x"][:, :, :1].copy()))
    with load(bundle, "update") as update:
        runs = Samplings(bundle.manifest, WAN_FAMILY, {**graphs, "update": update})
        (condition,) = runs.conditions(["unread"], None, 3)
        made = runs.run(condition, 7, 2, 1)
    assert [part for part, *_ in seen] == ["backbone", "flow_head"] * 4
    for number, (_, held, first) in enumerate(seen):
        assert held.tolist() == [float(number >= 4), 0.0, 0.0, 0.0, 0.0]
        assert np.array_equal(first, made[:, :, :1]) == (number >= 4)
