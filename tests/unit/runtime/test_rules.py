"""Velocity rules against diffusers' schedulers and closed forms, in the sum of the graph `update`, and their times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tmd_engines import Bundle, load
from tmd_engines.bundle.families.rules import RULES, Coefficients
from tmd_ref.samplers import wan_sigmas, wan_time
from tmd_runtime import NoiseStream
from tmd_runtime.sampling.schedule import euler_grid, told_time, unipc_grid, wan_grid
from tmd_runtime.sampling.update import Updater

SHAPE = (1, 16, 3, 4, 6)
GRIDS = {
    "one": [1.0, 0.0],
    "rcm": [0.987654, 0.933781, 0.852895, 0.608979, 0.0],
    "lightx2v": [1.0, 0.9375, 0.83333333, 0.625, 0.0],
    "wan 3": [*wan_sigmas(3, 3.0)],
    "wan 20": [*wan_sigmas(20, 8.0)],
}


def velocity(x: np.ndarray, t: float | np.floating) -> np.ndarray:
    """A smooth, nonlinear field of every value and of t."""
    return np.tanh(0.7 * x + 0.3 * np.roll(x, 1, -1) + t) + 0.2 * x


Field = Callable[[np.ndarray, Any], np.ndarray]


def sample(rule: str, times: list[float], seed: int = 3, field: Field = velocity) -> np.ndarray:
    """The sum of the graph `update`, in numpy."""
    stream = NoiseStream(seed)
    x: np.ndarray = stream.normal(SHAPE)
    before_1 = before_2 = x
    for i, t in enumerate(times[:-1]):
        c = Coefficients._make(map(np.float32, RULES[rule](times, i)))
        v = field(x, np.float32(t))
        noise = stream.normal(SHAPE) if c.noise else x
        data = x - np.float32(t) * v
        x = c.x * x + c.velocity * v + c.noise * noise + c.before_1 * before_1 + c.before_2 * before_2
        before_1, before_2 = data, before_1
    assert x.dtype == np.float32
    return x


def by_diffusers(scheduler, times: list[float], seed: int = 3) -> np.ndarray:
    """The same field through another project's scheduler, with the noise of torch's own generator.

    In float64, except where the scheduler draws: torch has another stream for doubles.
    """
    draws = "LCM" in type(scheduler).__name__
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPE, generator=generator).to(torch.float32 if draws else torch.float64)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.tensor(times, dtype=torch.float64)
    # 1000·sigma is not unique enough for a scheduler that looks times up, the step's number is.
    scheduler.timesteps = torch.arange(len(times) - 1.0, 0, -1)
    for t, timestep in zip(times, scheduler.timesteps, strict=False):
        v = torch.from_numpy(velocity(x.numpy(), np.float64(t)))
        options = {"generator": generator} if draws else {}
        x = scheduler.step(v.to(x.dtype), timestep, x, return_dict=False, **options)[0].to(x.dtype)
    return x.numpy()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("rule", RULES)
def test_rule_equals_diffusers(rule: str, grid: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        "renoise": lambda: diffusers.FlowMatchLCMScheduler(),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    }[rule]()
    times = list(GRIDS[grid])
    if rule == "unipc" and times[0] == 1:
        times[0] -= 1e-6  # where diffusers starts, to keep its logarithm finite
    np.testing.assert_allclose(sample(rule, times), by_diffusers(scheduler, times), rtol=0, atol=2e-5)


def test_unipc_may_start_at_pure_noise() -> None:
    """ln((1 - t)/t) is not finite at t = 1; a step from there is the limit (slowly reached) of steps from below."""
    times = GRIDS["lightx2v"]
    near = sample("unipc", [1 - 1e-15, *times[1:]])
    np.testing.assert_allclose(sample("unipc", times), near, rtol=0, atol=5e-5)


def test_renoise_of_rcm_in_float64() -> None:
    """x <- (1 - t')(x - t v) + t' noise, written out."""
    stream, times = NoiseStream(3), GRIDS["rcm"]
    x = stream.normal(SHAPE).astype(np.float64)
    for t, after in pairwise(times):
        data = x - t * velocity(x, t)
        x = data if after == 0 else (1 - after) * data + after * stream.normal(SHAPE)
    np.testing.assert_allclose(sample("renoise", times), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_rule_lands_on_the_data_of_a_straight_path(rule: str, grid: str) -> None:
    """With v = (x - data)/t, which is noise - data all along the path, each rule must end in the data."""
    data = NoiseStream(8).normal(SHAPE)
    found = sample(rule, GRIDS[grid], field=lambda x, t: (x - data) / np.float32(t))
    np.testing.assert_allclose(found, data, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("rule", "draws"), [("euler", 0), ("renoise", 3), ("unipc", 0)])
def test_noise_is_drawn_between_steps_and_not_after_the_last(rule: str, draws: int) -> None:
    """Another host of the same stream must know how much of it a run uses."""
    noises = [RULES[rule](GRIDS["rcm"], i).noise for i in range(4)]
    assert [bool(noise) for noise in noises] == [True] * draws + [False] * (4 - draws)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_rule_looks_back_no_further_than_its_run(rule: str, grid: str) -> None:
    """The first step has no data prediction before it, the second one."""
    times = GRIDS[grid]
    steps = [RULES[rule](times, i) for i in range(len(times) - 1)]
    assert not any(steps[0][3:]) and not any(step.before_2 for step in steps[:2])
    assert all(np.isfinite(step).all() for step in steps)


def test_the_updater_sums_what_a_rule_says(synthetic_bundle: Path) -> None:
    """On buffers of numpy, with every slot and with none, against float64."""
    dims = {"batch": 1, "frames": 3, "height": 4, "width": 6}
    with load(Bundle.open(synthetic_bundle), "update", "onnxruntime", "cpu", 1) as engine:
        buffers = [NoiseStream(seed).normal(SHAPE) for seed in range(6)]
        x, v, negative, noise, before_1, before_2 = (each.astype(np.float64) for each in buffers)
        updater = Updater(engine, buffers[0], dims)
        others = dict(zip(("negative", "noise", "before_1", "before_2"), buffers[2:], strict=True))
        everything, alone = updater.bind(buffers[1], **others), updater.bind(buffers[1])
        factors = Coefficients(0.7, -0.4, 0.3, -1.25, 0.5)
        updater.set(factors, 0.6, guidance=4.0)
        everything()
        mixed = negative + 4.0 * (v - negative)
        expected = 0.7 * x - 0.4 * mixed + 0.3 * noise - 1.25 * before_1 + 0.5 * before_2
        np.testing.assert_allclose(buffers[0], expected, rtol=0, atol=3e-6)
        np.testing.assert_allclose(updater.preview(), x - 0.6 * mixed, rtol=0, atol=3e-6)
        kept = buffers[0].copy()
        updater.set(Coefficients(1.0, -0.25))
        alone()
        assert np.array_equal(buffers[0], kept - np.float32(0.25) * buffers[1]), "unused slots change no bit"
        updater.check(buffers[3])


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (4, 3.0), (50, 5.0), (1000, 12.0)])
def test_wan_grid_and_whole_thousandths_equal_the_reference(steps: int, shift: float) -> None:
    grid = wan_grid(steps, shift)
    np.testing.assert_allclose(grid, wan_sigmas(steps, shift), rtol=1e-15)
    assert [told_time(t, "integer") for t in grid] == [wan_time(t) for t in grid]
    with pytest.raises(ValueError, match="at least"):
        wan_grid(0, shift)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 20, 50])
def test_grids_of_diffusers_are_what_its_schedulers_set(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    flow: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    for scheduler, grid, rounding in (
        (diffusers.UniPCMultistepScheduler(**flow), unipc_grid(steps, shift), "integer"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), euler_grid(steps, shift), "none"),
    ):
        scheduler.set_timesteps(steps)
        np.testing.assert_allclose(grid, scheduler.sigmas.numpy(), rtol=3e-6, atol=0)
        told = [1000 * told_time(t, rounding) for t in grid[:-1]]
        np.testing.assert_allclose(told, scheduler.timesteps.numpy(), rtol=3e-6, atol=0)


def test_wan_grid_of_the_official_code() -> None:
    """Printed by Wan2.1's own scheduler for 50 steps."""
    told = [round(1000 * told_time(t, "integer")) for t in wan_grid(50, 5.0)[:-1]]
    assert told[:6] == [999, 995, 991, 987, 982, 978] and told[-4:] == [302, 241, 172, 92]


def test_bfloat16_rounding_equals_torch() -> None:
    times = [*np.random.default_rng(0).random(200), 0.987654, 0.933781, 0.852895, 0.608979, 1.0, 0.0]
    expected = torch.tensor([1000 * t for t in times], dtype=torch.float32).bfloat16().double() / 1000
    assert [told_time(t, "bfloat16") for t in times] == expected.tolist()
    assert [round(1000 * told_time(t, "bfloat16")) for t in GRIDS["rcm"]] == [988, 932, 852, 608, 0]
    assert told_time(0.123456789, "none") == 0.123456789


def test_nearest_rounds_to_whole_thousandths() -> None:
    assert [told_time(t, "nearest") for t in (1.0, 28 / 37, 12 / 23, 0.0004)] == [1.0, 0.757, 0.522, 0.0]
