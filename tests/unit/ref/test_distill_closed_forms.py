"""Stage 1 and stage 2 on a mixture of two Gaussians in the plane, where velocities, flow maps and KL are known.

The mixture stands for what is to be generated given fixed features; there is no network, so what is tested is the
objectives alone: a head made of closed forms must be a stationary point of stage 1, and stage 2's direction must be the
gradient of the KL divergence between the noised distributions.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tmd_ref.distill import stage1
from tmd_ref.distill.data import LatentDataset
from tmd_ref.distill.draws import Draws
from tmd_ref.distill.stage1 import average_velocity, tm_meanflow_loss
from tmd_ref.distill.stage2 import predict_clip, vsd_gradient
from tmd_ref.wan import WanConfig

MEANS = torch.tensor([[1.0, 0.5], [-0.8, -0.3]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.35, 0.65], dtype=torch.float64)
STD = 0.4
DRAWN = 40_000


def noised(points, t, shift=0.0):
    """log p_t of the mixture moved by `shift` and mixed as (1-t)·x + t·noise; points `[n,2]`, t `[n]` or a number."""
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
    variance = ((1 - t) * STD) ** 2 + t**2
    square = (points[:, None] - (1 - t)[:, None] * (MEANS + shift)).square().sum(-1)
    return torch.logsumexp(WEIGHTS.log() - square / (2 * variance) - torch.log(2 * torch.pi * variance), 1)


def velocity(points, t, shift=0.0):
    """E[noise - x | x_t] = (-score·t - x_t)/(1-t) - score·t, the score by differentiation of log p_t. Needs t < 1."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(noised(points, t, shift).sum(), points)
    t = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1)
    noise = -t * score
    return noise - (points.detach() - t * noise) / (1 - t)


def draw(count, generator, shift=0.0):
    which = torch.multinomial(WEIGHTS, count, True, generator=generator)
    return MEANS[which] + shift + STD * torch.randn(count, 2, generator=generator, dtype=torch.float64)


def flow(points, s, r, steps=12):
    """The inner flow from s to r by Runge-Kutta: (y at r, the means over the way of E[y1 - y], of E[y])."""
    y, mean_v, mean_y = points, torch.zeros_like(points), torch.zeros_like(points)
    h = (s - r) / steps
    for k in range(steps):
        slopes: list[tuple[Any, Any]] = []
        for part in (0.0, 0.5, 0.5, 1.0):
            at = s - h * (k + part)
            here = y if not slopes else y - (h * part)[:, None] * slopes[-1][0]
            v = velocity(here, at)
            slopes.append((v, here - at[:, None] * v))
        v, data = ((a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(*slopes, strict=True))
        y, mean_v, mean_y = y - h[:, None] * v, mean_v + v / steps, mean_y + data / steps
    return y, mean_v, mean_y


def as_latents(points):
    return points[..., None, None, None]


class Mixture(LatentDataset):
    """Data such that the inner target y = x1 - x is the mixture, whatever the backbone would see: x = x1 - y."""

    null_embeds = torch.zeros(1, 1)

    def __init__(self, y):
        self.y = y

    def sample(self, draws):
        return draws.x, torch.zeros(len(draws), 1, 1)

    def rope(self, config, device=None):
        return torch.zeros(1), torch.zeros(1)


class ExactHead:
    """The head that solves the MeanFlow identity, plus `off` times a fixed function: the loss's slope at off = 0 is its
    residual, projected on that function."""

    config = WanConfig(dim=12, ffn_dim=12, num_heads=1, num_layers=2)

    def __init__(self, average):
        self.average = average
        self.off = torch.zeros((), dtype=torch.float64, requires_grad=True)
        head: Any = self._head
        head.__func__.fusion = None
        self.head = head

    def backbone(self, x, t, prompt_embeds, *rope):
        return x, prompt_embeds

    def _head(self, y, s, r, *features):
        points = y.flatten(1)
        _, mean_v, mean_y = flow(points, s, r)
        exact = mean_y if self.average == "noise" else points - s[:, None] * mean_v
        return as_latents(exact + self.off * points * (1 + s[:, None]))


def slope(monkeypatch, head_average, loss_average, count=12000):
    """The derivative of stage 1's loss by `off`, and its standard error, over `count` samples."""
    monkeypatch.setattr(
        stage1, "mix", lambda x, noise, t: (1 - t).view(-1, 1, 1, 1, 1) * x + t.view(-1, 1, 1, 1, 1) * noise
    )
    generator = torch.Generator().manual_seed(1)
    y = as_latents(draw(count, generator))
    student, slopes = ExactHead(head_average), []

    class Keyed(Draws):
        """Float64, and x chosen so that y = x1 - x is the mixture: the first noise drawn is x1."""

        x: torch.Tensor
        target: torch.Tensor

        def normal(self, shape):
            noise = torch.randn(len(self), *shape, generator=generator, dtype=torch.float64)
            if not hasattr(self, "x1"):
                self.x1 = self.x + self.target
                return self.x1
            return noise

    for part in torch.arange(count).split(1000):
        draws = Keyed(0, int(part[0]), len(part))
        draws.x, draws.target = torch.zeros_like(y[part]), y[part]
        data = Mixture(y[part])
        # a huge constant turns the adaptive weight into a common factor, which the minimum does not feel
        objective = tm_meanflow_loss(student, data, 1, 2, guidance=1.0, dropout=0.0, instant_share=0.0, delta=1e-4,
                                     weight_constant=1e6, average=loss_average)  # fmt: skip
        value, _ = objective(draws)
        (gradient,) = torch.autograd.grad(value, student.off)
        slopes.append(gradient.item() * 1e6)
    return np.mean(slopes), np.std(slopes, ddof=1) / len(slopes) ** 0.5


@pytest.mark.parametrize("average", ["noise", "state"])
def test_stage1_is_stationary_where_the_head_solves_the_meanflow_identity(monkeypatch, average):
    found, error = slope(monkeypatch, average, average)
    assert abs(found) < 4 * error, "the exact solution is a stationary point"
    other = "state" if average == "noise" else "noise"
    found, error = slope(monkeypatch, average, other)
    assert abs(found) > 6 * error, "and the solution for another reading of u is not"


def test_the_reading_of_u_decides_whether_one_step_is_the_flow_map():
    """From s = 1 to 0 with what stage 1 converges to: "state" gives the flow map, "noise" as printed shrinks."""
    y1 = torch.randn(4000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    s, r = torch.full((4000,), 0.999, dtype=torch.float64), torch.zeros(4000, dtype=torch.float64)
    truth, mean_v, mean_y = flow(y1, s, r, 60)
    ends = {
        name: y1 - s[:, None] * average_velocity(name, head[..., None, None, None], as_latents(y1), s, as_latents(y1))
        .flatten(1) for name, head in (("noise", mean_y), ("state", y1 - s[:, None] * mean_v))
    }  # fmt: skip
    assert (ends["state"] - truth).abs().max() < 1e-9
    exact = (MEANS.T * WEIGHTS) @ MEANS - torch.outer(WEIGHTS @ MEANS, WEIGHTS @ MEANS) + STD**2 * torch.eye(2)
    assert torch.cov(truth.T).diagonal().sum().item() == pytest.approx(exact.diagonal().sum().item(), rel=0.05)
    assert ends["noise"].var(0).sum() < 0.75 * truth.var(0).sum()


def test_one_step_of_the_printed_average_shrinks_a_unit_gaussian_to_arsinh():
    """For y ~ N(0, 1): ∫ E[y | y_τ] dτ = y1·∫ (1-τ)/√((1-τ)² + τ²) dτ = y1·arsinh(1)/√2 = 0.623·y1."""
    tau = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    found = ((1 - tau) / ((1 - tau) ** 2 + tau**2).sqrt()).mean().item()
    assert found == pytest.approx(np.arcsinh(1) / np.sqrt(2), rel=1e-6)


@pytest.mark.parametrize("t", [0.3, 0.7])
def test_stage2s_direction_is_the_gradient_of_the_kl_divergence(t):
    """A generator that makes the mixture moved by θ, a teacher of the mixture itself: (1-t)/t² times the mean of
    g_fake - g_teacher, carried to θ, is the derivative of KL(q_t ‖ p_t), here by quadrature and differences."""
    theta = torch.tensor([0.3, -0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    clip = draw(DRAWN, generator, theta)
    noise = torch.randn(DRAWN, 2, generator=generator, dtype=torch.float64)
    times = torch.full((DRAWN,), t, dtype=torch.float64)
    noisy = (1 - t) * clip + t * noise

    def network(shift):
        return lambda x, t, prompts, rope: as_latents(velocity(x.flatten(1), t, shift))

    unread: Any = None
    by_fake, by_teacher = (predict_clip(network(v), as_latents(noisy), times, unread, unread) for v in (theta, 0.0))
    # x0 = (x_t + t²·score)/(1-t), so score_q - score_p = (1-t)/t²·(g_fake - g_teacher); dx_t/dθ = 1-t
    found = (by_fake - by_teacher).flatten(1).mean(0) * (1 - t) ** 2 / t**2

    axis = torch.linspace(-6, 6, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)

    def kl(shift):
        log_q = noised(grid, t, shift)
        return (log_q.exp() * (log_q - noised(grid, t))).sum() * (axis[1] - axis[0]) ** 2

    step = 1e-4 * torch.eye(2, dtype=torch.float64)
    expected = torch.stack([(kl(theta + d) - kl(theta - d)) / 2e-4 for d in step])
    assert torch.allclose(found, expected, rtol=0.05, atol=0.01)

    for normaliser, scale in (("score", by_fake - by_teacher), ("x0", as_latents(clip) - by_teacher)):
        gradient = vsd_gradient(as_latents(clip), by_fake, by_teacher, normaliser)
        expected = (by_fake - by_teacher) / scale.abs().sum((1, 2, 3, 4), keepdim=True)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)
