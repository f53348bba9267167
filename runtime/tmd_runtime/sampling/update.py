"""The graph `update` on the buffers of a loop: x becomes the x of the next time, in one sum of the graph.

    v      = negative + guidance·(velocity - negative)
    x_next = c_x·x + c_v·v + c_noise·noise + c_1·before_1 + c_2·before_2
    data   = x - t·v

The host sets the factors (tmd_engines.bundle.families.rules) and copies x_next over x.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..clock import is_finite, not_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from tmd_engines import Engine
    from tmd_engines.bundle.families.rules import Coefficients


class Updater:
    """The update of one buffer `x`; `dims` are the sizes behind the symbols of the graph."""

    def __init__(self, engine: Engine, x: Any, dims: dict[str, int]) -> None:
        self._engine, self._x = engine, x
        self._coefficients = engine.empty("coefficients", **dims)
        self._made = {name: engine.empty(name, **dims) for name in ("x_next", "data", "magnitude")}
        self.data = self._made["data"]  # the data prediction of the latest step

    def bind(self, velocity: Any, **others: Any) -> Callable[[], None]:
        """An update by what `velocity` holds, and `others` of `negative`, `noise`, `before_1`, `before_2`.

        A slot that is not given must have the factor 0 (without `negative`: guidance 1). It shares a buffer that is
        finite whenever the update is, because 0 times NaN is NaN.
        """
        unused = {"negative": velocity, "noise": self._x, "before_1": self._x, "before_2": self._x}
        slots = {"x": self._x, "velocity": velocity, **unused, **others}
        run = self._engine.bind({**slots, "coefficients": self._coefficients}, self._made)

        def update() -> None:
            run()
            self._x[...] = self._made["x_next"]  # an engine does not write where it reads

        return update

    def set(self, factors: Coefficients, t: float = 0.0, guidance: float = 1.0) -> None:
        """Sets the factors of the updates to come, and the time t that `data` needs."""
        self._coefficients[...] = np.array([guidance, t, *factors], np.float64)

    def check(self, features: Any, others: Iterable[Callable[[], Any]] = ()) -> None:
        """Raises RuntimeFailure if x holds NaN or Inf. `features`, what the flow head read of the backbone, tells which
        of the two gave it. `others` compute the features of the step's other passes anew, where it had any."""
        if not np.isfinite(np.asarray(self._made["magnitude"])).all():
            finite = is_finite(features) and all(is_finite(again()) for again in others)
            raise not_finite("flow_head" if finite else "backbone")

    def preview(self) -> NDArray[np.float32]:
        """`data` of the latest step, as an array of its own."""
        return np.array(self.data, np.float32)
