"""Compiles the graphs of a bundle for one size ahead of the first run, or writes what NVIDIA's tools need for it."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import unfinished
from ..bundle.graph_file import parse_graph
from ..bundle.reader import Bundle
from ..device.cpu import resolve_threads
from ..device.gpu import split_device
from ..errors import EngineError
from ..registry import choose, engine_class, load
from ..tensorrt.plans import lowered_graph
from ..tensorrt.settings import workspace_limit
from .sizes import Sizes, input_shapes, plan_shapes, run_sizes

if TYPE_CHECKING:
    import onnx

    from ..bundle.manifest import GraphInfo
    from ..engine import Progress

_COMPARED = {"fp32": "1e-3", "fp16": "1e-2"}  # precision that ONNX Runtime has on the CPU -> what Polygraphy lets pass


def build(
    bundle: Bundle,
    engine: str,
    device: str,
    sizes: Sizes,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, str, str]]:
    """Compiles the graphs in turn for these sizes; yields (graph, engine, device) after each.

    All are checked before the first is built, as far as their engine can. Raises EngineError, and ValueError for a size
    that the model cannot make.
    """
    threads = resolve_threads(bundle, threads)[0]  # as runs have them: a plan is for a number of threads
    chosen = {graph: choose(bundle, graph, engine, device) for graph in bundle.manifest.graphs}
    shapes = {graph: plan_shapes(bundle, graph, sizes) for graph in chosen}
    for graph, (name, where) in chosen.items():
        for *_, largest in shapes[graph]:
            engine_class(name, split_device(where)[0]).check(bundle, graph, largest)
    for graph, (name, where) in chosen.items():
        with load(bundle, graph, name, where, threads, progress) as loaded:
            if not sizes.is_one:
                loaded.compile_range(*shapes[graph][0])
                yield graph, name, where
                continue
            for run in run_sizes(bundle, graph, *sizes.largest):
                sides = loaded.inputs, loaded.outputs
                loaded.bind(*({each: loaded.empty(each, **run) for each in side} for side in sides))
        yield graph, name, where


def write_for_trtexec(
    bundle: Bundle, folder: Path, version: tuple[int, int], size: tuple[int, int, int]
) -> Iterator[tuple[str, str, str]]:
    """Puts the graphs as TensorRT `version` gets them into `folder`; yields (graph, command line of trtexec, of
    Polygraphy).

    The first builds the plan. The second builds one too and runs it on random inputs beside ONNX Runtime on the CPU;
    where they part, its other options and `polygraphy debug` find the node. Graphs of types that ONNX Runtime lacks on
    a CPU run alone. Weights are copied. Needs no TensorRT.

    Raises EngineError for a graph that this version would refuse, or a folder that cannot be written, and ValueError
    for a size that the model cannot make.
    """
    if folder.exists() and folder.samefile(bundle.folder):
        raise EngineError(f"{folder} is the bundle itself, whose graphs must stay as they are: name another folder.")
    workspace = workspace_limit()
    for graph, info in bundle.manifest.graphs.items():
        every = [input_shapes(bundle, graph, sizes) for sizes in run_sizes(bundle, graph, *size)]
        shapes = every[-1]
        model = _lowered(bundle, graph, shapes, version)
        target = folder / info.file
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with unfinished.replacing(target) as new:
                new.write_bytes(model.SerializeToString(deterministic=True))
            if info.data:
                with unfinished.replacing(folder / info.data) as new:
                    shutil.copyfile(bundle.folder / info.data, new)  # onnx refuses links
        except OSError as error:
            raise EngineError(f"{target} cannot be written ({error.strerror}): name another folder.") from None
        command = ["trtexec", f"--onnx={target}", "--stronglyTyped", "--noTF32"]
        for which, row in (("min", every[0]), ("opt", shapes), ("max", shapes)):
            shapes_text = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in row.items())
            command.append(f"--{which}Shapes={shapes_text}")
        if workspace is not None:
            command.append(f"--memPoolSize=workspace:{workspace >> 20}M")
        command += [f"--timingCacheFile={folder / 'timing.cache'}", f"--saveEngine={target.with_suffix('.plan')}"]
        yield graph, shlex.join([*command, "--skipInference"]), shlex.join(_polygraphy(target, info, shapes, workspace))


def _polygraphy(target: Path, info: GraphInfo, shapes: dict[str, tuple[int, ...]], workspace: int | None) -> list[str]:
    command = ["polygraphy", "run", str(target), "--trt", "--strongly-typed", "--validate"]
    command += ["--input-shapes", *(f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items())]
    if workspace is not None:
        command += ["--pool-limit", f"workspace:{workspace >> 20}M"]
    if info.precision in _COMPARED:
        command += ["--onnxrt", "--providers", "cpu", "--atol", _COMPARED[info.precision]]
    return command


def _lowered(
    bundle: Bundle, graph: str, shapes: dict[str, tuple[int, ...]], version: tuple[int, int]
) -> onnx.ModelProto:
    path = bundle.graph_path(graph)
    return lowered_graph(parse_graph(bundle.read_graph(graph), str(path)), shapes, version, str(path))
