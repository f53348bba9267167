"""The sizes of video that graphs are compiled for: one, or a range of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..bundle.reader import Bundle
from ..cost.sizing import autoencoder_sizes, graph_sizes

_AUTOENCODER = ("encoder", "decoder_first", "decoder_step")  # these take one latent frame at a time
_DENOISER = ("backbone", "flow_head", "backbone_2", "flow_head_2", "update")

Size = tuple[int, int, int]  # width, height, frames


class Sizes(NamedTuple):
    """From the smallest to the largest; the plan is tuned for `best`."""

    smallest: Size
    best: Size
    largest: Size

    @property
    def is_one(self) -> bool:
        return self.smallest == self.largest

    def __str__(self) -> str:
        ends = [f"{frames} frames of {width}x{height}" for width, height, frames in (self.smallest, self.largest)]
        return ends[0] if self.is_one else " to ".join(ends)


def sizes_between(bundle: Bundle, sizes: tuple[Size, Size]) -> Sizes:
    """A range that is tuned for the bundle's own size where that lies in it, for the largest otherwise.

    Raises ValueError where the first size is not the smaller one.
    """
    smallest, largest = sizes
    if any(low > high for low, high in zip(smallest, largest, strict=True)):
        raise ValueError("A range of sizes goes from the smaller one to the larger one, in width, height and frames.")
    video = bundle.manifest.video
    own = (video.width, video.height, video.frames)
    inside = all(low <= size <= high for low, size, high in zip(smallest, own, largest, strict=True))
    return Sizes(smallest, own if inside else largest, largest)


def run_sizes(bundle: Bundle, graph: str, width: int, height: int, frames: int) -> list[dict[str, int]]:
    """What the symbols of a graph's shapes are in a run of this size, with a prompt of full length: one set for each
    batch size that the family binds.

    Raises ValueError for a size that the model cannot make.
    """
    manifest = bundle.manifest
    sizes = graph_sizes(manifest, width, height, frames)
    if graph in _AUTOENCODER:
        return [{**autoencoder_sizes(manifest, sizes), "frames": 1}]
    rows = manifest.family.rows(manifest.sampler) if graph in _DENOISER else (1,)
    return [{**sizes, "batch": count} for count in rows]


def input_shapes(bundle: Bundle, graph: str, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shapes of a graph's inputs."""
    return {spec.name: spec.resolve(**sizes) for spec in bundle.graph_info(graph).inputs}


def plan_shapes(bundle: Bundle, graph: str, sizes: Sizes) -> list[tuple[dict[str, tuple[int, ...]], ...]]:
    """Smallest, best and largest shapes of a graph's inputs, one triple for each plan that a run of these sizes needs.

    A range of sizes is one plan for all batch sizes, and for prompts of every length where the family keeps that.
    Raises ValueError for a size that the model cannot make.
    """
    if sizes.is_one:
        shapes = [input_shapes(bundle, graph, each) for each in run_sizes(bundle, graph, *sizes.largest)]
        return [(each, each, each) for each in shapes]
    low, best, high = (run_sizes(bundle, graph, *each) for each in sizes)
    smallest = {**low[0], "text": 1} if bundle.manifest.family.keeps_prompt_length else low[0]
    return [tuple(input_shapes(bundle, graph, each) for each in (smallest, best[-1], high[-1]))]
