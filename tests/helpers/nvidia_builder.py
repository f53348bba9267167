"""NVIDIA's own builder, from the package TensorRT for RTX: it needs no GPU, and says yes or no to a graph.

Graphs go as they go in the product: lowered, checked, marked, built. What comes back are the builder's figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx
from onnx import TensorProto

from tests.helpers.shipped_graphs import retyped
from tmd_engines import Bundle, EngineError
from tmd_engines.bundle.graph_file import parse_graph
from tmd_engines.command.sizes import input_shapes, run_sizes
from tmd_engines.tensorrt import library
from tmd_engines.tensorrt.plans import lowered_graph
from tmd_engines.tensorrt.profile import Ranges, between, exactly, largest
from tmd_engines.tensorrt.progress import BuildProgress
from tmd_engines.tensorrt.settings import BuildSettings

TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
PRIMITIVES, CANONICAL = (10, 3), (11, 0)  # versions of the two lowerings
Size = tuple[int, int, int]  # width, height, frames


@contextmanager
def nvidia_builder() -> Iterator[None]:
    """TensorRT for RTX as the library of this process; afterwards there is none again."""
    before = library._used
    library._used = None
    try:
        library.use(library.FOR_RTX)
        yield
    finally:
        library._used = before


def figures_of(
    model: onnx.ModelProto, ranges: Ranges, where: str = "graph", targets: tuple[str, ...] = ()
) -> dict[str, int]:
    """Builds a lowered graph. Raises EngineError saying what the parser or the builder said."""
    from tmd_engines.tensorrt.build import build

    with open(os.devnull, "wb") as out:
        content = model.SerializeToString()
        return build(
            content, where, ranges, BuildSettings(targets=targets), None, BuildProgress("it", None), out
        ).figures


def build_graph(
    bundle: Bundle, graph: str, version: tuple[int, int], sizes: tuple[Size, ...], precision: str | None = None
) -> tuple[onnx.ModelProto, Ranges]:
    """A graph lowered for `version`, in another precision if one is named, for one size or a range of three."""
    path = bundle.graph_path(graph)
    model = parse_graph(bundle.read_graph(graph), str(path))
    if precision is not None:
        model = retyped(model, bundle.folder, TYPES[precision])
    every = [run_sizes(bundle, graph, *size) for size in sizes]
    shapes = [input_shapes(bundle, graph, each[-1]) for each in every]
    shapes[0] = input_shapes(bundle, graph, every[0][0]) if len(sizes) > 1 else shapes[0]
    ranges = between(*shapes) if len(shapes) > 1 else exactly(shapes[0])
    return lowered_graph(model, largest(ranges), version, str(path)), ranges


def refusal(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], targets: tuple[str, ...] = ()) -> str | None:
    """What the builder says against a graph; None: it builds."""
    try:
        figures_of(model, exactly(shapes), targets=targets)
    except EngineError as error:
        return str(error)
    return None
