"""The stochastic sampler of Transition Models: what it keeps, where it adds noise, and what a run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import tmd_runtime
from tests.helpers.results import result_latents
from tests.helpers.synthetic import write_synthetic_bundle
from tests.helpers.synthetic_tim import write_tim_bundle
from tmd_engines import Bundle
from tmd_ref.tim.sampling import tim_sample, uniform_times
from tmd_runtime import NoiseStream, Pipeline, UsageFailure
from tmd_runtime.command.cli import command
from tmd_runtime.sampling.deadline import StepTimes
from tmd_runtime.sampling.tim import renewal

PROMPT = "a red circle moving right"
MEAN, SPREAD = 1.5, 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tim_bundle(tmp_path_factory.mktemp("rho") / "bundle")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return tmd_runtime.load(folder, threads=1)


def gaussian(x: Tensor, t: Tensor, r: Tensor, _: object) -> Tensor:
    """F of the exact flow map for data N(MEAN, SPREAD²), in closed form."""
    spread = [((1 - s) ** 2 * SPREAD**2 + s**2).sqrt() for s in (t, r)]
    turn = (spread[1] / spread[0]).view(-1, 1, 1, 1)
    at, to = (s.view(-1, 1, 1, 1) for s in (t, r))
    return (x - (1 - to) * MEAN - turn * (x - (1 - at) * MEAN)) / (at - to)


@pytest.mark.parametrize("rho", [0.0, 0.2, 1.0])
def test_fresh_noise_keeps_the_distribution_and_forgets_the_start(rho: float) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 1, 2, 2, generator=generator, dtype=torch.float64)
    out = tim_sample(gaussian, noise, torch.zeros(1), uniform_times(250), rho=rho, generator=generator)
    error = SPREAD / out.numel() ** 0.5
    assert abs(out.mean() - MEAN) < 4 * error
    assert abs(out.std() / SPREAD - 1) < 0.03  # of noise that were half as strong it would be 0.2 or more
    kept = torch.corrcoef(torch.stack((noise.flatten(), out.flatten())))[0, 1]
    assert kept > 0.999999 if rho == 0 else kept < 0.95


def test_a_short_step_loses_nothing_to_float32() -> None:
    """Against the formula in float64 with F itself, which the graph does not give."""
    rng = np.random.default_rng(0)
    x, f, noise = rng.standard_normal((3, 1000))
    for t, r in ((0.5, 0.496), (0.008, 0.004), (0.9, 0.1)):
        expected = x - (t - r) * f - 0.2 * (x + (1 - t) * f) * (t - r) + (2 * 0.2 * t * (t - r)) ** 0.5 * noise
        parts = [part.astype(np.float32) for part in (x, x - (t - r) * f)]
        a, b, c = np.array(renewal(t, r, 0.2)[:3], np.float32)
        parts.append(noise.astype(np.float32))
        found: Any = sum(factor * part for factor, part in zip((a, b, c), parts, strict=True))
        assert found.dtype == np.float32 and np.abs(found - expected).max() < 6e-7


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the noise that runs draw."""
    shapes: list[tuple[int, ...]] = []
    normal = NoiseStream.normal

    def counted(self: NoiseStream, shape: Any, out: Any = None) -> Any:
        shapes.append(shape)
        return normal(self, shape, out)

    monkeypatch.setattr(NoiseStream, "normal", counted)
    return shapes


@pytest.mark.parametrize(
    ("wishes", "draws"),
    [
        ({"steps": 5, "rho": 0.2}, 1 + 3),
        ({"steps": 5}, 1),
        ({"steps": 2, "rho": 0.2}, 1),
        ({"schedule": (1.0, 0.7, 0.6, 0.0), "rho": 0.2}, 1 + 1),
        ({"steps": 3, "strength": 0.5, "rho": 0.2}, 1 + 1),
    ],
)
def test_every_step_but_the_first_and_the_last_draws_noise(
    pipeline: Pipeline, drawn: list[tuple[int, ...]], wishes: dict[str, Any], draws: int
) -> None:
    picture: dict[str, Any] = {"init_latents": np.zeros((1, 16, 1, 8, 8), np.float32)} if "strength" in wishes else {}
    result = pipeline(PROMPT, seed=3, size=(64, 64), **picture, **wishes)
    assert drawn == [(1, 16, 1, 8, 8)] * draws
    assert result.rho == (0.2 if draws > 1 else 0)
    assert any("where rho adds noise" in line for line in result.warnings) == (wishes.get("steps") == 2)


def test_previews_change_nothing_and_a_bundle_may_ask_for_noise(pipeline: Pipeline) -> None:
    shown: list[Any] = []
    plain, noisy = (result_latents(pipeline(PROMPT, seed=3, steps=6, rho=rho)) for rho in (0.0, 0.3))
    watched = pipeline(PROMPT, seed=3, steps=6, rho=0.3, on_preview=shown.append)
    assert len(shown) == 5 and np.array_equal(result_latents(watched), noisy)
    assert np.abs(noisy - plain).max() > 0.1
    sampler = pipeline.manifest.sampler.model_copy(update={"rho": 0.3})
    manifest = pipeline.manifest.model_copy(update={"sampler": sampler})
    with Pipeline(Bundle(pipeline.bundle.folder, manifest), threads=1) as asking:
        assert np.array_equal(result_latents(asking(PROMPT, seed=3, steps=6)), noisy)
        assert np.array_equal(result_latents(asking(PROMPT, seed=3, steps=6, rho=0)), plain)
        assert not asking.settings(steps=2).warnings and asking.settings(steps=2).rho == 0


def test_a_deadline_draws_noise_in_the_steps_that_it_takes(
    pipeline: Pipeline, drawn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jumps = iter([(1.0, 0.8), (0.8, 0.3), (0.3, 0.1), (0.1, 0.0)])
    monkeypatch.setattr("tmd_runtime.sampling.tim.steps_in_time", lambda *_: jumps)
    monkeypatch.setattr(StepTimes, "measure", lambda *_: 0.0)
    result = pipeline(PROMPT, seed=3, deadline=1.0, rho=0.2)
    assert len(drawn) == 1 + 2 and result.times == (1.0, 0.8, 0.3, 0.1, 0.0)
    drawn.clear()
    again = pipeline(PROMPT, seed=3, schedule=result.times, rho=0.2)
    assert np.array_equal(result_latents(again), result_latents(result))


def test_the_command_line_carries_it_and_the_picture_says_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    shared = ["--bundle", str(folder), "--prompt", PROMPT, "--seed", "3", "--out", str(out)]
    ran = CliRunner().invoke(command, [*shared, "--steps", "5", "--rho", "0.2"])
    assert ran.exit_code == 0 and "steps 5, rho 0.2, NFE" in ran.output
    assert Image.open(out).text["rho"] == "0.2"  # type: ignore[attr-defined]
    ran = CliRunner().invoke(command, [*shared[:-1], str(tmp_path / "y.png"), "--steps", "5"])
    assert "rho" not in ran.output and "rho" not in Image.open(tmp_path / "y.png").text  # type: ignore[attr-defined]
    tmd = write_synthetic_bundle(tmp_path / "tmd")
    with tmd_runtime.load(tmd) as other, pytest.raises(UsageFailure, match="rho is for Transition Models"):
        other.settings(rho=0.2)
