"""Which layers a precision hurts, by measurement: the result with one layer quantized, and with all but a few."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from .calibration import Sensitivity

GOAL = 0.05
"""Relative L2 error of a graph's result that quantization may make: a cosine of about 0.9987."""

Arrays = Mapping[str, np.ndarray]


def measure(
    compute: Callable[[Arrays, Collection[str]], Arrays],
    layers: Sequence[str],
    passes: Sequence[tuple[Arrays, Arrays]],
    each: bool | None,
    tell: Callable[..., Any] = lambda *_: None,
    goal: float = GOAL,
) -> Sensitivity:
    """The table of `layers`, and those of them to keep.

    `compute`: inputs and the layers to quantize -> outputs. `passes`: inputs, and outputs in float32. The worst layers
    by the table stay in high precision, one after the other, until the rest is within `goal`. `each`: make the table
    even if nothing needs to be kept; None: do not make it, and keep nothing. `tell` hears how many of how many layers
    are done.
    """

    def error(chosen: Collection[str]) -> float:
        difference = total = 0.0
        for inputs, outputs in passes:
            found = compute(inputs, chosen)
            for name, expected in outputs.items():
                difference += float(np.square(found[name] - expected, dtype=np.float64).sum())
                total += float(np.square(expected, dtype=np.float64).sum())
        return (difference / total) ** 0.5

    everything = left = error(set(layers))
    table: dict[str, float] = {}
    if each or (each is not None and left > goal):
        for done, layer in enumerate(layers):
            tell(done, len(layers))
            table[layer] = error({layer})
    kept: list[str] = []
    for layer in sorted(table, key=table.__getitem__, reverse=True):
        if left <= goal:
            break
        kept.append(layer)
        left = error(set(layers) - set(kept))
    return Sensitivity(everything=everything, chosen=left, layers=table, kept=tuple(kept))
