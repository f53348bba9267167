"""The objective of Transition Models against closed forms: times, weight, and a Gaussian whose flow map is known."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor

from tests.helpers.tim_models import randomised
from tests.helpers.tim_training import CONFIG, Data, settings
from tmd_ref.distill.config import ConfigError
from tmd_ref.distill.draws import Draws, like, mix
from tmd_ref.distill.tim import distance, interval_weight, sample_times, tim_loss, transition_target
from tmd_ref.distill.tim_config import TiMRun, load_any
from tmd_ref.distill.trainer import AveragedWeights, Run, Schedule, train
from tmd_ref.tim.model import TiM
from tmd_ref.tim.sampling import tim_sample, uniform_times


def test_times_are_the_ends_of_two_logit_normal_draws() -> None:
    draws = Draws(0, 0, 4000)
    t, r = sample_times(draws, -0.4, 1.0, 0.5, 0.1)
    assert torch.equal(r[:2000], t[:2000]) and not r[3600:].any()
    assert (r[2000:3600] < t[2000:3600]).all()
    cdf = norm(-0.4, 1.0).cdf
    assert kstest(torch.logit(t.double()).numpy(), lambda v: cdf(v) ** 2).pvalue > 0.01
    assert kstest(torch.logit(r[2000:3600].double()).numpy(), lambda v: 1 - (1 - cdf(v)) ** 2).pvalue > 0.01


def test_interval_weight_and_distance() -> None:
    weight = interval_weight(torch.tensor([0.5, 0.9, 0.9]), torch.tensor([0.5, 0.4, 0.0]))
    expected = [1, (1 + math.tan(0.9) - math.tan(0.4)) ** -0.5, (1 + math.tan(0.9)) ** -0.5]
    torch.testing.assert_close(weight, torch.tensor(expected))
    a = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # two places: (3, 0) and (0, 2)
    b = torch.tensor([[[[0.0, 0.0]], [[1.0, 1.0]]]])  # (0, 1) and (0, 1)
    assert distance(a, b, directional=False).item() == (9 + 1 + 0 + 1) / 4
    assert distance(a, b, directional=True).item() == pytest.approx((9 + 1 + 0 + 1) / 4 + (1 + 0) / 2)


SPREAD = 0.5


class GaussianFlow:
    """Exact F for data N(0, SPREAD²): x_r = x_t·φ(r)/φ(t), φ(t)² = (1-t)²·SPREAD² + t²; plus `off` times a function.

    At off = 0 the slope of the loss is its residual, projected on that function; zero is the promise.
    """

    config = CONFIG

    def __init__(self) -> None:
        self.off = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def context(self, y: Tensor) -> Tensor:
        return y.unsqueeze(0)

    def velocity(self, x: Tensor, t: Tensor, r: Tensor, context: object, rope: object) -> Tensor:
        given, x, t, r = x.dtype, x.double(), t.double(), r.double()
        phi_t, phi_r = (((1 - s) ** 2 * SPREAD**2 + s**2).sqrt() for s in (t, r))
        velocity = (t - (1 - t) * SPREAD**2) / phi_t**2
        average = torch.where(t - r > 1e-6, (1 - phi_r / phi_t) / (t - r).clamp_min(1e-6), velocity)
        return (like(average + self.off * (1 + t - r), x) * x).to(given)


@pytest.mark.parametrize("derivative", ["difference", "exact"])
@pytest.mark.parametrize("shares", [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0)], ids=["any r", "r = 0", "r = t"])
def test_the_true_flow_map_is_a_fixed_point(derivative: str, shares: tuple[float, float]) -> None:
    network = GaussianFlow()
    chosen = settings(
        derivative=derivative, instant_share=shares[0], zero_share=shares[1], directional=False, adaptive=None
    )
    objective, slopes = tim_loss(network, Data(SPREAD, 24), chosen), []
    for step in range(30):
        value, _ = objective(Draws(3, step, 32))
        (slope,) = torch.autograd.grad(value, network.off)
        slopes.append(slope.item())
    error = np.std(slopes) / len(slopes) ** 0.5
    assert abs(np.mean(slopes)) < 4 * error and error < 2e-3


def test_the_target_of_the_true_flow_map_is_itself_without_noise() -> None:
    """Float64, no sampling: E[v | x_t] and the derivative along it give back F, and the other sign does not."""
    flow = GaussianFlow()
    x, t, r = torch.randn(3, 1, 1, 1, dtype=torch.float64), torch.tensor([0.9, 0.6, 0.3]), torch.tensor([0.2, 0.0, 0.1])
    t, r = t.double(), r.double()

    def f(x: Tensor, t: Tensor) -> Tensor:
        return flow.velocity(x, t, r, x, None)

    velocity = flow.velocity(x, t, t, x, None)
    derivative = torch.func.jvp(f, (x, t), (velocity, torch.ones_like(t)))[1]
    torch.testing.assert_close(transition_target(velocity, t, r, derivative), f(x, t), rtol=0, atol=1e-12)
    assert (transition_target(velocity, t, r, -derivative) - f(x, t)).abs().max() > 0.05


def test_difference_and_forward_mode_agree() -> None:
    """In float64 the central difference of the network is its derivative up to delta², in loss and in gradient."""
    results = []
    for options in ({"derivative": "exact"}, {"delta": 1e-4}, {"delta": 5e-3}):
        model = randomised(CONFIG, torch.float64).requires_grad_(True)

        class Double(Draws):
            def normal(self, shape: Any) -> Tensor:
                return super().normal(shape).double()

        value, _ = tim_loss(model, Data(), settings(instant_share=0.25, zero_share=0.25, **options))(Double(5, 0, 8))
        value.backward()
        slope_found = model.final_layer.linear.weight.grad
        assert slope_found is not None
        results.append((value.item(), slope_found.clone()))
    (exact, slope), (fine, fine_slope), (coarse, _) = results
    assert fine == pytest.approx(exact, abs=1e-7) and coarse == pytest.approx(exact, abs=1e-3)
    torch.testing.assert_close(fine_slope, slope, rtol=0, atol=1e-6)


def test_guided_target_is_that_of_the_averaged_weights() -> None:
    class Network:
        """F = scale·(mean of the prompt); the averaged weights have scale 10."""

        config, scale = CONFIG, 1.0

        def context(self, y: Tensor) -> Tensor:
            return y.unsqueeze(0)

        def __call__(self, x: Tensor, t: Tensor, r: Tensor, y: Tensor, rope: object) -> Tensor:
            assert self.scale == 1 or torch.equal(t, r)
            return self.velocity(x, t, r, (y,), rope)

        def velocity(self, x: Tensor, t: Tensor, r: Tensor, context: tuple[Tensor, ...], rope: object) -> Tensor:
            (y,) = context
            return (self.scale * y.mean((1, 2)) * (1 + 0 * t)).view(-1, 1, 1, 1) + 0 * x

    network, data = Network(), Data()

    @contextlib.contextmanager
    def averaged() -> Any:
        network.scale = 10.0
        yield
        network.scale = 1.0

    class Averaged(AveragedWeights):
        def __enter__(self) -> None:
            self._inside = averaged()
            self._inside.__enter__()

        def __exit__(self, *error: object) -> None:
            self._inside.__exit__(None, None, None)

    guided = {"weight": 0.75, "truth": 0.9, "interval": (0.3, 0.8), "after": 2}
    chosen = settings(guided=guided, instant_share=1.0, zero_share=0.0, dropout=0.0, directional=False, adaptive=None)
    objective = tim_loss(network, data, chosen, Averaged())
    for step in (1, 2):
        value, _ = objective(Draws(0, step, 64))
        draws = Draws(0, step, 64)
        latents, prompt = data.sample(draws)
        draws.uniform()
        x, noise = latents.squeeze(2), draws.normal((2, 2, 2))
        t, _ = sample_times(draws, 0.0, 1.6, 1.0, 0.0)
        f, null = prompt.mean((1, 2)), data.null_embeds.mean()
        inside = like((t >= 0.3) & (t <= 0.8) & (step == 2), x)
        mixed = 0.9 * (noise - x) + like(0.75 * 10 * f - 0.65 * 10 * null, x)
        target = torch.where(inside, mixed, noise - x)
        assert inside.any() == (step == 2) and not inside.all()
        torch.testing.assert_close(value, (like(f, x) - target).square().mean())
    with pytest.raises(ValueError, match="ema"):
        tim_loss(network, data, chosen)


def trained(folder: Path, stop_at: int | None = None) -> TiM:
    torch.manual_seed(0)
    model = TiM(CONFIG)
    chosen = settings(guided={"weight": 0.5, "after": 1})
    averaged = AveragedWeights()
    objective = tim_loss(model, Data(), chosen, averaged)

    def interrupted(draws: Draws) -> Any:
        if draws.step == stop_at:
            raise KeyboardInterrupt
        return objective(draws)

    run = Run(folder, 4, micro=2, save_every=2, log_every=1, report=lambda line: None)
    schedule = Schedule(steps=5, lr=1e-2, warmup=0, ema=0.5)
    return train({"tim": (model, schedule)}, interrupted, run, averaged=averaged)["tim"]  # type: ignore[return-value]


def test_training_resumes_to_the_bit_with_the_target_of_its_average(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop_at=3)
    parts = trained(tmp_path / "parts")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)
    assert whole.final_layer.linear.weight.any()


class One(Data):
    """A single still: F(x_t, t, r) = (x_t - still)/t for all r, and every schedule ends in it."""

    still = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))

    def sample(self, draws: Draws) -> tuple[Tensor, Tensor]:
        return self.still.expand(len(draws), -1, -1, -1, -1), torch.zeros(len(draws), 4, 8)


@pytest.mark.slow
def test_training_learns_a_single_still_for_any_number_of_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TiM(CONFIG)
    objective = tim_loss(model, One(), settings(dropout=0.0))
    schedule = Schedule(steps=400, lr=1e-2, warmup=20, ema=0.9)
    run = Run(tmp_path, 32, log_every=100, save_every=1000, report=lambda line: None)
    model = train({"tim": (model, schedule)}, objective, run)["tim"]  # type: ignore[assignment]
    noise = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(9))
    for steps in (1, 2, 4, 16):
        out = tim_sample(model, noise, torch.zeros(16, 4, 8), uniform_times(steps))
        assert (
            out - One.still.squeeze(1)
        ).square().mean() < 0.15  # of about 2 untrained; found: 0.085, 0.0015, 0.007, 0.016


def test_averaged_weights_belong_to_a_training_that_keeps_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give them to `train`"), AveragedWeights():
        pass
    model = TiM(CONFIG)
    with pytest.raises(ValueError, match="ema"):
        train(
            {"tim": (model, Schedule(steps=1, lr=1e-3))},
            lambda draws: (mix(model.final_layer.linear.bias, torch.zeros(2), torch.ones(2)).sum(), {}),
            Run(tmp_path),
            averaged=AveragedWeights(),
        )


def test_the_baselines_differ_from_the_model_in_their_objective_alone() -> None:
    configs: list[Any] = [load_any(name) for name in ("tim-tiny", "tim-tiny-flow", "tim-tiny-meanflow")]
    for config in configs:
        assert isinstance(config, TiMRun)
        assert (config.data, config.model, config.tim.steps, config.tim.batch, config.tim.optimizer) == (
            configs[0].data, configs[0].model, configs[0].tim.steps, configs[0].tim.batch, configs[0].tim.optimizer,
        )  # fmt: skip
    assert [config.tim.instant_share for config in configs] == [0.5, 1.0, 0.75]
    assert [config.evaluate.instant for config in configs] == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tim.zero_share=0.6", "together at most 1"),
        ("tim.guided={weight: 1}", None),
        ("tim={guided: {weight: 1}, optimizer: {ema: 0}}", "set optimizer.ema"),
        ("data.frames=17", "1 frame"),
        ("model=tim-t2i", "choose one of tim-tiny"),
        ("tim.stepz=3", "unknown key"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: str, message: str | None) -> None:
    if message is None:
        load_any("tim-tiny", [change])
        return
    with pytest.raises(ConfigError, match=message):
        load_any("tim-tiny", [change])
