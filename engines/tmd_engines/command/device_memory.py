"""What a run needs of a GPU with TensorRT: weights, one piece of scratch memory for all graphs, and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..bundle.reader import Bundle, format_size
from ..cost.sizing import estimate


class DeviceMemory(NamedTuple):
    """In bytes. Graphs follow one another, so that the largest `scratch` serves them all."""

    weights: int
    scratch: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.scratch + self.buffers

    def __str__(self) -> str:
        return (
            f"{format_size(self.total)}: weights {format_size(self.weights)}, scratch {format_size(self.scratch)}, "
            f"buffers {format_size(self.buffers)}"
        )


def device_memory(bundle: Bundle, size: tuple[int, int, int], figures: Mapping[str, Mapping[str, int]]) -> DeviceMemory:
    """The need of a run of this size (width, height, frames), with every graph of `figures` loaded.

    `figures` has the bytes of weights and scratch by graph, as the builder says or as they are predicted.
    """
    width, height, frames = size
    stages = estimate(bundle, width=width, height=height, frames=frames).stages
    return DeviceMemory(
        sum(each.get("weights", 0) for each in figures.values()),
        max((each.get("scratch", 0) for each in figures.values()), default=0),
        sum(stage.io_bytes for stage in stages.values()),
    )
