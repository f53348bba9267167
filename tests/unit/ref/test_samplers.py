"""Grids, effective NFE and the samplers, against the paper's tables, closed forms and diffusers' schedulers."""

import subprocess
import sys
from typing import cast

import numpy as np
import pytest
import torch

from tmd_ref.samplers import (
    effective_nfe,
    euler_sample,
    guided_velocity,
    shift_grid,
    tmd_sample,
    unipc_sample,
    wan_sigmas,
    wan_time,
)
from tmd_ref.student import TimeGrids, TMDStudent

SHAPE = (2, 16, 3, 4, 6)
Prompts = tuple[torch.Tensor, torch.Tensor]


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        (1, 10, [0, 0.999]),
        (2, 10, [0, 0.9091, 0.999]),
        (3, 10, [0, 0.8333, 0.9524, 0.999]),
        (4, 10, [0, 0.7692, 0.9091, 0.9677, 0.999]),
        (4, 5, [0, 0.625, 0.8333, 0.9375, 0.999]),
    ],
)
def test_e_grids_equal_the_papers(steps, shift, expected):
    grid = shift_grid(steps, shift)
    assert grid.dtype == np.float64
    assert grid.shape == (steps + 1,)
    assert grid[0] == 0
    assert grid[-1] == 0.999
    np.testing.assert_allclose(grid, expected, rtol=0, atol=5.1e-5)


@pytest.mark.parametrize("arguments", [(0, 10), (2, 0.5), (2, 10, 0), (2, 10, 1.5), (1000, 10)])
def test_impossible_grids_are_refused(arguments):
    with pytest.raises(ValueError, match="steps"):
        shift_grid(*arguments)


@pytest.mark.parametrize(
    ("layers", "outer", "inner", "head", "blocks", "nfe"),
    [
        (30, 1, 2, 5, 35, 1.17),
        (30, 2, 2, 5, 70, 2.33),
        (30, 1, 4, 5, 45, 1.50),
        (30, 2, 4, 5, 90, 3.00),
        (30, 2, 2, 3, 66, 2.20),
        (30, 2, 2, 8, 76, 2.53),
        (30, 2, 4, 2, 72, 2.40),
        (30, 2, 4, 3, 78, 2.60),
        (40, 1, 4, 5, 55, 1.375),
        (40, 2, 4, 5, 110, 2.75),
    ],
)
def test_effective_nfe_equals_the_papers_table(layers, outer, inner, head, blocks, nfe):
    assert effective_nfe(outer, inner, head, layers) == pytest.approx(nfe, abs=5e-3)
    assert effective_nfe(outer, inner, head, layers) * layers == pytest.approx(blocks)


@pytest.mark.parametrize("arguments", [(0, 1, 1, 2), (1, 0, 1, 2), (1, 1, 0, 2), (1, 1, 3, 2)])
def test_impossible_nfe_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        effective_nfe(*arguments)


class RecordedStudent:
    """Stands in for a student: every pass returns fresh random outputs and keeps what it was given."""

    grids = TimeGrids()

    def __init__(self):
        self.generator = torch.Generator().manual_seed(7)
        self.backbone_calls, self.head_calls = [], []

    def rope(self, latents):
        return torch.zeros(1), torch.zeros(1)

    def backbone(self, x, t, prompt_embeds, cos, sin):
        features = torch.randn(3, generator=self.generator)
        self.backbone_calls.append((x, t, features))
        return features, prompt_embeds

    def head(self, y, s, r, features, context, cos, sin):
        output = torch.randn(y.shape, generator=self.generator)
        self.head_calls.append((y, s, r, features, output))
        return output


def as_student(recorded: RecordedStudent) -> TMDStudent:
    return cast(TMDStudent, recorded)


@pytest.mark.parametrize(("outer_steps", "inner_steps"), [(1, 1), (2, 2), (3, 4)])
def test_tmd_sample_is_algorithm_1(outer_steps, inner_steps):
    noise, inner_noise = torch.randn(SHAPE), torch.randn(outer_steps, *SHAPE)
    student = RecordedStudent()
    result = tmd_sample(
        as_student(student), noise, torch.zeros(2, 1, 1), outer_steps, inner_steps, inner_noise=inner_noise
    )

    t, s = shift_grid(outer_steps, 10), shift_grid(inner_steps, 10)
    x = noise.double()
    head_calls = iter(student.head_calls)
    assert len(student.backbone_calls) == outer_steps
    assert len(student.head_calls) == outer_steps * inner_steps
    for step, (seen_x, seen_t, features) in enumerate(student.backbone_calls):
        i = outer_steps - step
        torch.testing.assert_close(seen_x.double(), x, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen_t.double(), torch.full((2,), t[i]).double())
        y1 = y = inner_noise[step].double()
        for j in range(inner_steps, 0, -1):
            seen_y, seen_s, seen_r, seen_features, output = next(head_calls)
            torch.testing.assert_close(seen_y.double(), y, rtol=0, atol=1e-5)
            torch.testing.assert_close(seen_s.double(), torch.full((2,), s[j]).double())
            torch.testing.assert_close(seen_r.double(), torch.full((2,), s[j - 1]).double())
            assert seen_features is features
            y = y - (s[j] - s[j - 1]) * (y1 - output.double())
        x = x - (t[i] - t[i - 1]) * y
    torch.testing.assert_close(result.double(), x, rtol=0, atol=1e-5)


def test_inner_noise_as_tensor_and_as_function_are_the_same_stream():
    draws = []

    def draw(shape):
        draws.append(torch.randn(shape))
        return draws[-1]

    noise = torch.randn(SHAPE)
    by_function = tmd_sample(as_student(RecordedStudent()), noise, torch.zeros(2, 1, 1), 3, 2, inner_noise=draw)
    by_tensor = tmd_sample(
        as_student(RecordedStudent()), noise, torch.zeros(2, 1, 1), 3, 2, inner_noise=torch.stack(draws)
    )
    assert len(draws) == 3
    assert torch.equal(by_function, by_tensor)


def test_inner_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="3 outer steps"):
        tmd_sample(
            as_student(RecordedStudent()),
            torch.randn(SHAPE),
            torch.zeros(2, 1, 1),
            3,
            2,
            inner_noise=torch.randn(2, *SHAPE),
        )


@pytest.mark.parametrize(
    ("shift", "head", "tail"),
    [
        (3, [999, 992, 985, 978, 971, 963], [206, 160, 111, 57, 0]),
        (5, [999, 995, 991, 987, 982, 978], [302, 241, 172, 92, 0]),
        (8, [999, 997, 994, 991, 989, 986], [409, 337, 249, 140, 0]),
    ],
)
def test_wan_grid_has_the_official_timesteps(shift, head, tail):
    """Timesteps that the official code prints for 50 steps."""
    timesteps = [round(1000 * wan_time(sigma)) for sigma in wan_sigmas(50, shift)]
    assert timesteps[:6] == head
    assert timesteps[-5:] == tail


def velocity(x, t, prompt_embeds):
    """A smooth made-up teacher that uses everything it is given."""
    return (
        torch.tanh(x.roll(1, -1) + t.view(-1, 1, 1, 1, 1)) - 0.5 * x + prompt_embeds.mean((1, 2)).view(-1, 1, 1, 1, 1)
    )


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(11)
    return torch.randn(2, 5, 3, generator=generator), torch.randn(2, 5, 3, generator=generator)


@pytest.fixture
def noise():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(12))


def guided(x, t, prompts, guidance):
    negative = velocity(x, t, prompts[1])
    return negative + guidance * (velocity(x, t, prompts[0]) - negative)


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (4, 3.0), (20, 8.0)])
def test_euler_equals_diffusers(noise, prompts: Prompts, steps, shift):
    diffusers = pytest.importorskip("diffusers")
    sigmas = wan_sigmas(steps, shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=sigmas[:-1].tolist())
    torch.testing.assert_close(scheduler.sigmas.double(), torch.tensor(sigmas), rtol=0, atol=1e-6)
    x = noise
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        v = guided(x, torch.full((2,), wan_time(sigma)), prompts, 5.0)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    result = euler_sample(velocity, noise, *prompts, steps=steps, shift=shift, guidance=5.0)
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 5.0), (3, 5.0), (8, 3.0), (30, 8.0)])
def test_unipc_equals_diffusers(noise, prompts: Prompts, steps, shift):
    diffusers = pytest.importorskip("diffusers")
    sigmas = wan_sigmas(steps, shift)
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor(sigmas)
    scheduler.timesteps = torch.tensor([round(1000 * wan_time(sigma)) for sigma in sigmas[:-1]])
    x = noise.double()
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        v = guided(x, torch.full((2,), wan_time(sigma)).double(), prompts, 5.0)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    result = unipc_sample(velocity, noise.double(), *prompts, steps=steps, shift=shift, guidance=5.0)
    torch.testing.assert_close(result, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sample", [euler_sample, unipc_sample])
def test_straight_paths_are_solved_exactly(sample, noise):
    """A teacher that knows the data point: v = noise - data along the whole path, so every solver must land on it."""
    data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    result = sample(
        lambda x, t, prompt_embeds: noise - data, noise.double(), torch.zeros(2, 1, 1), steps=7, guidance=1.0
    )
    # The grid starts at sigma 0.9998, not 1: what is left of the noise there stays.
    torch.testing.assert_close(result, data, rtol=0, atol=2e-3)


def test_guidance_moves_away_from_the_negative_prompt(noise, prompts: Prompts):
    times = torch.full((2,), 0.5)
    result = guided_velocity(velocity, noise, 0.5, *prompts, guidance=3.0)
    positive, negative = velocity(noise, times, prompts[0]), velocity(noise, times, prompts[1])
    torch.testing.assert_close(result, negative + 3 * (positive - negative))
    assert torch.equal(guided_velocity(velocity, noise, 0.5, *prompts, guidance=0.0), negative)


@pytest.mark.parametrize(("negative", "guidance", "passes"), [(True, 5.0, 2), (True, 1.0, 1), (False, 5.0, 1)])
def test_guidance_that_is_off_costs_one_pass(noise, prompts, negative, guidance, passes):
    calls = []

    def counted(x, t, prompt_embeds):
        calls.append(prompt_embeds)
        return velocity(x, t, prompt_embeds)

    guided_velocity(counted, noise, 0.5, prompts[0], prompts[1] if negative else None, guidance)
    assert len(calls) == passes
    assert calls[0] is prompts[0]


@pytest.mark.parametrize("sample", [euler_sample, unipc_sample])
@pytest.mark.parametrize("arguments", [{"steps": 0}, {"shift": 0.5}])
def test_impossible_steps_are_refused(sample, arguments, noise, prompts):
    with pytest.raises(ValueError, match="at least 1"):
        sample(velocity, noise, *prompts, **arguments)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, tmd_ref; assert tmd_ref.__all__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_name_of_the_package_exists():
    import tmd_ref

    for name in tmd_ref.__all__:
        assert getattr(tmd_ref, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tmd_ref.nothing
