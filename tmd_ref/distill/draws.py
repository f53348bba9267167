"""Random numbers of training, keyed by (seed, step, sample): the same whoever draws them.

A sample's numbers do not depend on which process trains on it, on the size of the micro-batches or on how often the run
was interrupted. So a run needs no generator state in its checkpoint, and many processes give the curve of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

T_MIN, T_MAX = 0.001, 0.999


class Draws:
    """The randomness of some samples of one training step.

    `indices`: which of the step's `batch` samples these are. Every method draws for all of them, on the CPU in float32,
    and returns it on `device`. The order of the calls matters, as with any generator.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch: int = 1,
        indices: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.seed, self.step, self.batch, self.device = seed, step, batch, torch.device(device)
        self.indices = list(range(batch)) if indices is None else list(indices)
        keys = (np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] for i in self.indices)
        self._generators = [torch.Generator().manual_seed(int(key) >> 1) for key in keys]

    def __len__(self) -> int:
        return len(self.indices)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """N(0, 1), `[n, *shape]`."""
        return self._each(lambda generator: torch.randn(*shape, generator=generator))

    def uniform(self) -> Tensor:
        """Uniform on [0, 1), `[n]`."""
        return self._each(lambda generator: torch.rand((), generator=generator))

    def integers(self, high: int) -> Tensor:
        """Uniform on 0..high-1, int64 `[n]`."""
        return self._each(lambda generator: torch.randint(high, (), generator=generator))

    def times(self, shift: float) -> Tensor:
        """Times uniform on (0.001, 0.999), moved towards noise by shift·t / ((shift - 1)·t + 1)  (TMD A.2). `[n]`."""
        t = T_MIN + (T_MAX - T_MIN) * self.uniform()
        return (shift * t / ((shift - 1) * t + 1)).clamp(T_MIN, T_MAX)

    def first(self, share: float) -> Tensor:
        """Which samples are among the first `share` of the step's batch, bool `[n]`.

        A fixed number instead of a coin per sample: the same share with less noise.
        """
        return (torch.tensor(self.indices) < round(self.batch * share)).to(self.device)

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self.device)


def like(values: Tensor, target: Tensor) -> Tensor:
    """`[B]` to `[B, 1, ...]`, to multiply `target`."""
    return values.view(-1, *[1] * (target.dim() - 1))


def mix(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t)·x + t·noise, with t `[B]`."""
    t = like(t, x)
    return (1 - t) * x + t * noise
