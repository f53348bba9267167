"""Velocity rules: what one step makes of x and of the velocity v = noise - data that a model gives for it.

x_t = (1 - t)·data + t·noise; a step goes from t to the next time t', the last one to 0. A rule is a pure function to
the factors of a sum, which the graph `update` computes: x_next = c_x·x + c_v·v + c_noise·noise + c_1·m' + c_2·m'', with
m' and m'' the data predictions x - t·v of the step before and of the one before that. Everything here is float64, with
the same operations in the same order as in the C++ library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Coefficients(NamedTuple):
    """Factors of x, the velocity, fresh noise and the data predictions of the latest two steps."""

    x: float
    velocity: float
    noise: float = 0.0
    before_1: float = 0.0
    before_2: float = 0.0


Rule = Callable[[Sequence[float], int], Coefficients]
"""(times, falling and ending in 0; i) -> the factors of the step from times[i] to times[i + 1]. A step draws fresh
noise exactly if its factor is not 0."""


def euler(times: Sequence[float], i: int) -> Coefficients:
    """x + (t' - t)·v."""
    return Coefficients(1.0, times[i + 1] - times[i])


def renoise(times: Sequence[float], i: int) -> Coefficients:
    """(1 - t')·(x - t·v) + t'·noise with fresh noise: predict the data, then make it as noisy as the next time wants.

    The multistep sampling of consistency models (arXiv 2303.01469, Algorithm 1); rCM and the DMD students use it. The
    last step, to 0, returns the predicted data and draws nothing.
    """
    now, after = times[i], times[i + 1]
    return Coefficients(1.0 - after, -(1.0 - after) * now, after)


def unipc(times: Sequence[float], i: int) -> Coefficients:
    """UniPC of order 2, variant B2, predicting data, with corrector (arXiv 2302.04867): Wan's default solver.

    With s = the time before, alpha = 1 - t, lambda = ln(alpha/t), h = lambda_t - lambda_s, B = e^-h - 1 and the data
    predictions m: the predictor is (t/s)·x_s - alpha·B·m_s, at order 2 with - alpha·B·D/2, D = (m_before - m_s)/r,
    r = (lambda_before - lambda_s)/h. The corrector repeats the step into t once m_t is known: it and the predictor have
    the same factor t/s of x_s, so x corrected is x plus the differences of the other factors. The first step has order
    1; the last one, to 0, returns the data prediction.
    """
    now = times[i]
    m = before_1 = before_2 = 0.0  # corrected x = x + m·m_t + before_1·m_s + before_2·m_before
    if i:
        predicted, corrected = (_unipc_weights(times, i - 1, correct) for correct in (False, True))
        before_1, before_2, m = (new - old for new, old in zip(corrected[1:], predicted[1:], strict=True))
    start, this, last, _ = _unipc_weights(times, i, correct=False)
    m = start * m + this
    # m_t = x - t·v
    return Coefficients(start + m, -m * now, 0.0, start * before_1 + last, start * before_2)


def _unipc_weights(times: Sequence[float], at: int, correct: bool) -> tuple[float, float, float, float]:
    """Weights of x, m_s, m_before and m_t in the step from s = times[at] to t = times[at + 1]."""
    s, t = times[at], times[at + 1]
    if t == 0:
        return 0.0, 1.0, 0.0, 0.0
    h = _log_snr(t) - _log_snr(s)
    b = math.expm1(-h)
    scale = -(1.0 - t) * b
    before = after = 0.0
    # In slopes, whose weights the solver gives: D = (m_before - m_s)/r and m_t - m_s.
    if at:
        r = (_log_snr(times[at - 1]) - _log_snr(s)) / h
        if correct:
            p1 = -b / h - 1.0
            b1, b2 = p1 / b, 2.0 * (-p1 / h - 0.5) / b
            rho = (b2 - b1) / (r - 1.0)  # solves [[1, 1], [r, 1]] (rho, after) = (b1, b2)
            before, after = rho / r, b1 - rho
        else:
            before = 0.5 / r
    elif correct:
        after = 0.5
    return t / s, scale * (1.0 - before - after), scale * before, scale * after


def _log_snr(t: float) -> float:
    """ln((1 - t)/t): minus infinity for pure noise."""
    return math.log((1.0 - t) / t) if t < 1.0 else -math.inf


RULES: dict[str, Rule] = {"euler": euler, "renoise": renoise, "unipc": unipc}
"""`sampler.rule` of a manifest -> the rule."""
