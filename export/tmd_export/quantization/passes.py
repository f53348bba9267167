"""Passes of a graph that are kept to compare with: inputs and outputs, several at a time where that is possible."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from tmd_engines import TensorSpec

Arrays = dict[str, np.ndarray]
Specs = Iterable[TensorSpec]

MOST = 8  # in one run: weights are read once for all of them, and what is between takes memory for each


class Pass(NamedTuple):
    """Inputs and outputs of `calls` calls of a graph, one behind the other along the batch."""

    inputs: Arrays
    outputs: Arrays
    calls: int = 1


def stacked(inputs: Specs, outputs: Specs, passes: Sequence[Pass], most: int = MOST) -> list[Pass]:
    """`passes`, with up to `most` in a row in one if they have the same sizes and share what has no batch.

    As they are if a tensor has the batch anywhere but in front, such as the guidance of a Transition Model.
    """
    places = {
        spec.name: [axis for axis, of in enumerate(spec.factors()) if of[1] == "batch"] for spec in (*inputs, *outputs)
    }
    if any(axes not in ([], [0]) for axes in places.values()):
        return list(passes)
    batched = {name for name, axes in places.items() if axes}
    found: list[list[Pass]] = []
    for each in passes:
        if found and len(found[-1]) < most and _alike(found[-1][0], each, batched):
            found[-1].append(each)
        else:
            found.append([each])
    return [
        Pass(
            _joined([each.inputs for each in group], batched),
            _joined([each.outputs for each in group], batched),
            sum(each.calls for each in group),
        )
        for group in found
    ]


def _alike(one: Pass, other: Pass, batched: Collection[str]) -> bool:
    return all(
        a[name].shape == b[name].shape and (name in batched or np.array_equal(a[name], b[name]))
        for a, b in ((one.inputs, other.inputs), (one.outputs, other.outputs))
        for name in a
    )


def _joined(group: Sequence[Arrays], batched: Collection[str]) -> Arrays:
    return {
        name: np.concatenate([arrays[name] for arrays in group]) if name in batched else value
        for name, value in group[0].items()
    }
