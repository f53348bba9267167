"""What the machine could do at most: the rate of one large matrix product in float32, by numpy's BLAS."""

from __future__ import annotations

from time import perf_counter

import numpy as np

SIZE = 2048


class MatmulLimit:
    """A contender that multiplies two `SIZE` x `SIZE` matrices; it runs in turn with the others."""

    def load(self) -> dict[str, float]:
        generator = np.random.default_rng(0)
        self._a, self._b = (generator.standard_normal((SIZE, SIZE), np.float32) for _ in range(2))
        self._c = np.empty((SIZE, SIZE), np.float32)
        return {}

    def run(self) -> dict[str, float]:
        start = perf_counter()
        np.matmul(self._a, self._b, out=self._c)
        return {"matmul": perf_counter() - start}


FLOPS = 2 * SIZE**3
"""Of one run."""
