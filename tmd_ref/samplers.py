"""Samplers as plain functions: TMD's transitions for the student, Euler and UniPC with guidance for its teacher.

Time runs from 1 (noise) to 0 (data), x_t = (1 - t)·data + t·noise, and a model's output is the velocity noise - data.
Grids and coefficients are float64; the arithmetic on latents has the dtype of the latents.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tmd_ref.student import TMDStudent, flow_head_step

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A teacher: (x `[B, 16, T, H, W]`, t `[B]` in 0..1, prompt_embeds `[B, S, E]`) -> velocity, shape of x."""


def shift_grid(steps: int, shift: float, t_max: float = 0.999) -> np.ndarray:
    """Time grid of a few-step sampler, data to noise: 0 = t_0 < ... < t_steps = t_max.

    Equispaced times k/steps warped by t = shift·t' / ((shift - 1)·t' + 1)  (TMD §3.2; Esser et al. 2024).

    Returns float64 `[steps + 1]`, dimensionless. Raises ValueError if steps < 1, shift < 1, t_max is not in (0, 1], or
    t_max leaves no room for so many steps.
    """
    if steps < 1 or shift < 1 or not 0 < t_max <= 1:
        raise ValueError(
            f"steps {steps}, shift {shift}, t_max {t_max}: need steps >= 1, shift >= 1 and 0 < t_max <= 1."
        )
    grid = warp(np.arange(steps + 1) / steps, shift)
    grid[-1] = t_max
    if grid[-2] >= t_max:
        raise ValueError(
            f"{steps} steps with shift {shift} reach {grid[-2]:.6f} before the last one, which is not below "
            f"t_max {t_max}: use fewer steps."
        )
    return grid


def warp(t: np.ndarray, shift: float) -> np.ndarray:
    """shift·t / ((shift - 1)·t + 1): moves times towards noise, keeps 0 and 1."""
    return shift * t / ((shift - 1) * t + 1)


def wan_sigmas(steps: int, shift: float) -> np.ndarray:
    """Wan2.1's own grid, noise to data: `steps` equispaced values from 0.999 (0 left out), warped, then 0.

    Returns float64 `[steps + 1]`, descending. Raises ValueError if steps < 1 or shift < 1.
    """
    if steps < 1 or shift < 1:
        raise ValueError(f"steps {steps}, shift {shift}: both must be at least 1.")
    return np.append(warp(np.linspace(0.999, 0, steps + 1)[:-1], shift), 0.0)


def effective_nfe(outer_steps: int, inner_steps: int, head_blocks: int, num_layers: int) -> float:
    """Blocks run, divided by the blocks of the teacher: M·(1 + (N - 1)·H/L)  (TMD Eq. 16)."""
    if min(outer_steps, inner_steps, head_blocks) < 1 or num_layers < head_blocks:
        raise ValueError(
            f"outer steps {outer_steps}, inner steps {inner_steps}, head blocks {head_blocks} of {num_layers}: "
            "all must be at least 1, and the head cannot have more blocks than there are."
        )
    return outer_steps * (1 + (inner_steps - 1) * head_blocks / num_layers)


def inner_flow(
    head: Callable[..., Tensor],
    noise: Tensor,
    grid: np.ndarray,
    features: Tensor,
    context: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The flow head's rollout from its noise to the velocity, differentiable in every step (inner TMD Algorithm 1).

    `noise` `[B, 16, T, H, W]`, `grid` ascending `[N + 1]` from `shift_grid`, the rest as in `FlowHead.forward`.
    Equals (1 - s_N)·noise + sum of (s_j - s_{j-1})·head_j, a convex combination of the head's outputs and 0.1 % noise.
    Returns the velocity, shape of noise.
    """
    y = noise
    for j in range(len(grid) - 1, 0, -1):
        s, r = (noise.new_full((len(noise),), grid[k]) for k in (j, j - 1))
        y = flow_head_step(head, y, noise, s, r, features, context, cos, sin)
    return y


@torch.no_grad()
def tmd_sample(
    student: TMDStudent,
    noise: Tensor,
    prompt_embeds: Tensor,
    outer_steps: int,
    inner_steps: int,
    shift: float | None = None,
    inner_shift: float | None = None,
    t_max: float = 0.999,
    inner_noise: Tensor | Callable[[torch.Size], Tensor] | None = None,
) -> Tensor:
    """Few-step sampling with a TMD student (TMD Algorithm 1, with the sign of Eq. 13 corrected); no guidance.

    noise `[B, 16, T, H, W]` is x at t_max; prompt_embeds `[B, S, E]`. Shifts that are None are those that the student
    was distilled for. `inner_noise` starts the inner rollouts, in the
    order in which they run: a tensor `[outer_steps, B, 16, T, H, W]`, a function of the shape called once per outer
    step, or None for torch's global generator. Returns latents, shape of noise. Raises ValueError for bad steps or
    an `inner_noise` of another shape.
    """
    t = shift_grid(outer_steps, student.grids.outer_shift if shift is None else shift, t_max)
    s = shift_grid(inner_steps, student.grids.inner_shift if inner_shift is None else inner_shift, t_max)
    if isinstance(inner_noise, Tensor) and inner_noise.shape != (outer_steps, *noise.shape):
        raise ValueError(
            f"inner_noise is {tuple(inner_noise.shape)}: {outer_steps} outer steps with noise {tuple(noise.shape)} "
            f"need {(outer_steps, *noise.shape)}."
        )
    cos, sin = student.rope(noise)
    x = noise
    for i in range(outer_steps, 0, -1):
        features, context = student.backbone(x, x.new_full((len(x),), t[i]), prompt_embeds, cos, sin)
        if inner_noise is None:
            y1 = torch.randn_like(noise)
        elif isinstance(inner_noise, Tensor):
            y1 = inner_noise[outer_steps - i]
        else:
            y1 = inner_noise(noise.shape)
        y = inner_flow(student.head, y1, s, features, context, cos, sin)
        x = x - float(t[i] - t[i - 1]) * y
    return x


@torch.no_grad()
def dmd_sample(
    model: Velocity, noise: Tensor, prompt_embeds: Tensor, outer_steps: int, shift: float = 10.0, t_max: float = 0.999
) -> Tensor:
    """Few-step sampling with a DMD2-v generator, TMD's baseline; no guidance.

    From t to t' the clip g = x - t·v is mixed with the noise that x implies, x' = (1 - t'/t)·g + (t'/t)·x, which is an
    Euler step x - (t - t')·v. (Our copy of the paper's Eq. 18 has the two terms swapped; at t' = 0 it must give g.)
    noise `[B, 16, T, H, W]`, embeds `[B, S, E]`. Returns latents, shape of noise. Raises ValueError for bad steps.
    """
    grid = shift_grid(outer_steps, shift, t_max)
    x = noise
    for i in range(outer_steps, 0, -1):
        x = x - float(grid[i] - grid[i - 1]) * model(x, x.new_full((len(x),), grid[i]), prompt_embeds)
    return x


def guided_velocity(
    model: Velocity, x: Tensor, t: float, prompt_embeds: Tensor, negative_embeds: Tensor | None, guidance: float
) -> Tensor:
    """Classifier-free guidance v = v_neg + guidance·(v_pos - v_neg); one pass if it is off (no negative, or 1)."""
    times = x.new_full((len(x),), t)
    positive = model(x, times, prompt_embeds)
    if negative_embeds is None or guidance == 1:
        return positive
    negative = model(x, times, negative_embeds)
    return negative + guidance * (positive - negative)


def wan_time(sigma: float) -> float:
    """The time that Wan's network is told at noise level sigma: whole thousandths, cut off, while sigma stays exact."""
    return math.floor(1000 * sigma) / 1000


@torch.no_grad()
def euler_sample(
    model: Velocity,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None = None,
    steps: int = 50,
    shift: float = 5.0,
    guidance: float = 5.0,
) -> Tensor:
    """Euler steps x + (sigma_next - sigma)·v on Wan's grid. noise `[B, 16, T, H, W]`, embeds `[B, S, E]` each.

    Returns latents, shape of noise. Raises ValueError if steps < 1 or shift < 1.
    """
    sigmas = wan_sigmas(steps, shift)
    x = noise
    for sigma, sigma_next in itertools.pairwise(sigmas):
        v = guided_velocity(model, x, wan_time(sigma), prompt_embeds, negative_embeds, guidance)
        x = x + float(sigma_next - sigma) * v
    return x


@torch.no_grad()
def unipc_sample(
    model: Velocity,
    noise: Tensor,
    prompt_embeds: Tensor,
    negative_embeds: Tensor | None = None,
    steps: int = 50,
    shift: float = 5.0,
    guidance: float = 5.0,
) -> Tensor:
    """Wan's default solver: UniPC of order 2, B2 variant, predicting data, corrector on (arXiv 2302.04867).

    The first step has order 1; the last one, to sigma = 0, returns the data prediction itself.
    Arguments, result and errors as `euler_sample`.
    """
    sigmas = wan_sigmas(steps, shift)
    x = noise
    start = noise  # x at the previous sigma, before its step
    data: list[Tensor] = []  # data predictions, oldest first
    order = 0
    for i, sigma in enumerate(sigmas[:-1]):
        v = guided_velocity(model, x, wan_time(sigma), prompt_embeds, negative_embeds, guidance)
        predicted = x - float(sigma) * v
        if i > 0:
            x = _unipc_update(start, sigmas[: i + 1], data, order, predicted)
        data = [*data[-1:], predicted]  # the prediction is not made anew after the correction
        order = min(2, i + 1)
        start, x = x, _unipc_update(x, sigmas[: i + 2], data, order)
    return x


def _unipc_update(
    x: Tensor, sigmas: np.ndarray, data: list[Tensor], order: int, corrected_by: Tensor | None = None
) -> Tensor:
    """From x at s = sigmas[-2] to t = sigmas[-1], with data predictions at s (data[-1]) and before it (data[-2]).

    Without `corrected_by` the predictor, with it (the data prediction at t) the corrector.
    """
    s, t = float(sigmas[-2]), float(sigmas[-1])
    m = data[-1]
    if t == 0:
        return m
    h = _log_snr(t) - _log_snr(s)
    b = math.expm1(-h)
    slopes = []  # pairs (weight, difference of data predictions)
    if order == 2:
        r = (_log_snr(float(sigmas[-3])) - _log_snr(s)) / h
        before = (data[-2] - m) / r
        if corrected_by is None:
            slopes = [(0.5, before)]
        else:
            p1 = -b / h - 1
            b1, b2 = p1 / b, 2 * (-p1 / h - 0.5) / b
            rho = (b2 - b1) / (r - 1)  # solves [[1, 1], [r, 1]] (rho, b1 - rho) = (b1, b2)
            slopes = [(rho, before), (b1 - rho, corrected_by - m)]
    elif corrected_by is not None:
        slopes = [(0.5, corrected_by - m)]
    alpha = 1 - t
    x = (t / s) * x - alpha * b * m
    for weight, slope in slopes:
        x = x - alpha * b * weight * slope
    return x


def _log_snr(sigma: float) -> float:
    """lambda = ln(alpha/sigma) with alpha = 1 - sigma."""
    return math.log((1 - sigma) / sigma)
