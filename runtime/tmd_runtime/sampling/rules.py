"""Update rules for models that predict the velocity v = noise - data: what one step makes of x.

x_t = (1 - t)·data + t·noise; a step goes from t to the next time t', and the last one to 0. Scalars are float64,
latents float32. Each rule works in the buffers that it got: nothing of size is allocated in a step. The order of the
operations on arrays is part of what a rule is: an implementation that follows it gives the same bits, each product and
each sum rounded to float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .noise import NoiseStream

    Latents = NDArray[Any]


class Rule(ABC):
    """One way to step, for latents of one shape. `start` begins a run, `step` is called once per time."""

    draws = False  # whether a step draws noise

    def __init__(self, shape: tuple[int, ...], empty: Callable[[], Latents] | None = None) -> None:
        """`empty` makes a buffer like the latents, where they are not float32 numpy arrays."""
        self._shape = shape
        self._empty = empty or (lambda: np.empty(shape, np.float32))
        self._times: Sequence[float] = ()

    def start(self, times: Sequence[float], stream: NoiseStream) -> None:
        """A run through `times`, descending and ending in 0; a rule that needs noise draws it from `stream`."""
        self._times, self._stream = times, stream

    @abstractmethod
    def step(self, i: int, x: Latents, v: Latents) -> None:
        """Moves `x` from times[i] to times[i + 1] in place, `v` its velocity. `v` is working space afterwards."""


class Euler(Rule):
    """x + (t' - t)·v."""

    def step(self, i: int, x: Latents, v: Latents) -> None:
        np.multiply(v, self._times[i + 1] - self._times[i], out=v)
        np.add(x, v, out=x)


class Renoise(Rule):
    """(1 - t')·(x - t·v) + t'·noise with fresh noise: predict the data, then make it as noisy as the next time wants.

    The multistep sampling of consistency models (arXiv 2303.01469, Algorithm 1); rCM and the DMD students use it. The
    last step, to 0, returns the predicted data and draws nothing.
    """

    draws = True

    def step(self, i: int, x: Latents, v: Latents) -> None:
        now, after = self._times[i], self._times[i + 1]
        np.multiply(v, now, out=v)
        np.subtract(x, v, out=x)
        if after > 0:
            np.multiply(x, 1.0 - after, out=x)
            v[...] = self._stream.normal(self._shape)
            np.multiply(v, after, out=v)
            np.add(x, v, out=x)


class UniPC(Rule):
    """UniPC of order 2, variant B2, predicting data, with corrector (arXiv 2302.04867): Wan's default solver.

    With s = the time before, alpha = 1 - t, lambda = ln(alpha/t), h = lambda_t - lambda_s, B = e^-h - 1 and the data
    predictions m: the predictor is (t/s)·x_s - alpha·B·m_s, at order 2 with - alpha·B·D/2, D = (m_before - m_s)/r,
    r = (lambda_before - lambda_s)/h. The corrector repeats the step into t once m_t is known. The first step has order
    1; the last one, to 0, returns the data prediction.
    """

    def __init__(self, shape: tuple[int, ...], empty: Callable[[], Latents] | None = None) -> None:
        super().__init__(shape, empty)
        self._from = self._empty()  # x before the latest step
        self._data = [self._empty() for _ in range(3)]  # m of the three latest times, taking turns

    def step(self, i: int, x: Latents, v: Latents) -> None:
        m = self._data[i % 3]
        np.multiply(v, self._times[i], out=m)
        np.subtract(x, m, out=m)
        if i:
            start, *others = self._weights(i - 1, i, correct=True)
            np.multiply(self._from, start, out=x)
            self._add(x, v, ((others[0], i - 1), (others[1], i - 2), (others[2], i)))
        self._from[...] = x
        start, *others = self._weights(i, i + 1, correct=False)
        np.multiply(x, start, out=x)
        self._add(x, v, ((others[0], i), (others[1], i - 1)))

    def _add(self, x: Latents, work: Latents, terms: tuple[tuple[float, int], ...]) -> None:
        for weight, number in terms:
            if weight:
                np.multiply(self._data[number % 3], weight, out=work)
                np.add(x, work, out=x)

    def _weights(self, at: int, to: int, correct: bool) -> tuple[float, float, float, float]:
        """Weights of x, m_s, m_before and m_t in the step from times[at] to times[to]."""
        s, t = self._times[at], self._times[to]
        if t == 0:
            return 0.0, 1.0, 0.0, 0.0
        h = _log_snr(t) - _log_snr(s)
        b = math.expm1(-h)
        scale = -(1.0 - t) * b
        before = after = 0.0
        # In slopes, whose weights the solver gives: D = (m_before - m_s)/r and m_t - m_s.
        if at:
            r = (_log_snr(self._times[at - 1]) - _log_snr(s)) / h
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


RULES: dict[str, type[Rule]] = {"euler": Euler, "renoise": Renoise, "unipc": UniPC}
"""Name in the manifest -> rule. TMD's `transition` has an inner flow and is a loop of its own."""


def _log_snr(t: float) -> float:
    """ln((1 - t)/t): minus infinity for pure noise."""
    return math.log((1.0 - t) / t) if t < 1.0 else -math.inf
