"""What a run needs of a GPU with TensorRT: weights, one piece of scratch memory for all graphs, and buffers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..bundle.graph_file import parse_graph
from ..bundle.reader import Bundle, format_size
from ..cost.fused import scratch_bytes
from ..cost.shapes import infer_shapes
from ..cost.sizing import STAGES, TOGETHER, estimate
from ..tensorrt.lowering import CANONICAL_SINCE, lower
from .sizes import input_shapes, run_sizes


class StageMemory(NamedTuple):
    """In bytes."""

    weights: int
    scratch: int
    buffers: int


class DeviceMemory(NamedTuple):
    """The stages of a run. Graphs follow one another, so that the largest scratch memory serves them all."""

    stages: dict[str, StageMemory]

    @property
    def every(self) -> StageMemory:
        """With every graph loaded."""
        return _together(self.stages.values())

    @property
    def low(self) -> StageMemory:
        """One stage after the other (`--memory low`): that of the largest."""
        groups = [[self.stages[name] for name in names if name in self.stages] for names in TOGETHER]
        return max((_together(group) for group in groups if group), key=sum, default=StageMemory(0, 0, 0))

    def lines(self) -> tuple[str, str]:
        """For people."""
        one, other = (
            f"{format_size(sum(each))} (weights {format_size(each.weights)}, scratch {format_size(each.scratch)}, "
            f"buffers {format_size(each.buffers)})"
            for each in (self.every, self.low)
        )
        return f"{one} with every graph loaded", f"{other} one stage after the other"


def _together(stages: Iterable[StageMemory]) -> StageMemory:
    every = list(stages)
    return StageMemory(
        sum(each.weights for each in every),
        max((each.scratch for each in every), default=0),
        sum(each.buffers for each in every),
    )


def device_memory(bundle: Bundle, size: tuple[int, int, int], figures: Mapping[str, Mapping[str, int]]) -> DeviceMemory:
    """The need of a run of this size (width, height, frames).

    `figures` has the bytes of weights and scratch by graph, as the builder says or as `predicted`.
    """
    width, height, frames = size
    clip = 2 * 3 * width * height * frames  # lies in the host's memory
    stages = {}
    for name, stage in estimate(bundle, width=width, height=height, frames=frames, from_picture=True).stages.items():
        found = [figures[graph] for graph in STAGES[name] if graph in figures]
        if name == "decoder" and frames == 1:
            found = [figures[graph] for graph in ("decoder_first",) if graph in figures]
        stages[name] = StageMemory(
            sum(each.get("weights", 0) for each in found),
            max((each.get("scratch", 0) for each in found), default=0),
            stage.io_bytes - (clip if name == "decoder" else 0),
        )
    return DeviceMemory(stages)


def predicted(bundle: Bundle, size: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    """What the builder will say of each graph, from the graph alone. Raises ValueError, BundleError."""
    found = {}
    for graph in bundle.manifest.graphs:
        where = str(bundle.graph_path(graph))
        shapes = input_shapes(bundle, graph, run_sizes(bundle, graph, *size)[-1])
        model = parse_graph(bundle.read_graph(graph), where)
        lower(model, CANONICAL_SINCE, shapes)
        shaped = infer_shapes(model, shapes, where)
        weights = sum(shaped.tensors[name].nbytes for name in shaped.weights)
        found[graph] = {"weights": weights, "scratch": scratch_bytes(shaped)}
    return found
