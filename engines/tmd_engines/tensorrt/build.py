"""A lowered graph -> a plan. One strongly typed path for every version: types are those of the graph.

Import after `library.use`. Names that came or went between versions are asked for where they are used;
`tests/unit/engines/test_tensorrt_contract.py` holds this module against NVIDIA's own bindings.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import EngineError
from .library import trt, used
from .log import Log
from .profile import Ranges
from .progress import BuildProgress
from .settings import BuildSettings


class Built(NamedTuple):
    """What a build tells: `figures` in bytes (scratch, activations, weights, plan), and the timing cache for the next
    one, where the library has one."""

    figures: dict[str, int]
    timing: bytes | None


class _Monitor(trt.IProgressMonitor):
    def __init__(self, progress: BuildProgress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: Any) -> None:
        self._progress.phase_start(phase_name, parent_phase, num_steps)

    def step_complete(self, phase_name: str, step: Any) -> bool:
        return self._progress.step_complete(phase_name, step)

    def phase_finish(self, phase_name: str) -> None:
        self._progress.phase_finish(phase_name)


def name_and_version() -> str:
    """The library as people call it: "TensorRT 10.3.0"."""
    return f"{used().title} {used().version()}"


def new_builder(log: Log) -> trt.Builder:
    """A builder. Raises EngineError where the bindings are there and the libraries or the driver are not."""
    try:
        return trt.Builder(log)
    except TypeError:  # what pybind11 makes of a null pointer
        raise EngineError(f"{name_and_version()} does not start: {log.reason()}. See tmd-engine doctor.") from None


def build(
    model: bytes,
    path: str,
    ranges: Ranges,
    settings: BuildSettings,
    timing: bytes | None,
    progress: BuildProgress,
    out: BinaryIO,
) -> Built:
    """Writes the plan of a graph for inputs of these sizes to `out`.

    `model` is the serialized graph, `path` a file beside which its external data lies. `timing` is an earlier timing
    cache, which the library ignores where it does not fit. Where the library can, weights are read from their file
    while it builds and the plan is written as it comes, so that neither is held. Raises EngineError saying what the
    library said, or whatever `progress` or `out` raised.
    """
    log = Log()
    builder = new_builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    with _parsed(parser, model, path) as parsed:
        if not parsed:
            problems = "; ".join(str(parser.get_error(number).desc()) for number in range(parser.num_errors))
            raise EngineError(f"{name_and_version()} cannot read {path}: {problems[:600] or log.reason()}")
        config = builder.create_builder_config()
        # On by default: products of float32 would lose 13 of their 23 bits.
        config.clear_flag(trt.BuilderFlag.TF32)
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        if settings.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        monitor = _Monitor(progress)  # the library does not keep it alive
        config.progress_monitor = monitor
        saved = used().configure(config, settings, timing)
        profile = builder.create_optimization_profile()
        for name, sizes in ranges.items():
            smallest, best, largest = (trt.Dims(list(shape)) for shape in sizes)
            profile.set_shape(name, smallest, best, largest)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"{name_and_version()} refuses the sizes {dict(ranges)} for {path}: {log.reason()}")
        written = _write(builder, network, config, out)
    if progress.stopped is not None:
        raise progress.stopped
    if not written:
        raise EngineError(f"{name_and_version()} cannot build {path}: {log.reason()}")
    return Built({**log.figures, "plan": written}, saved())


def _parsed(parser: trt.OnnxParser, model: bytes, path: str) -> AbstractContextManager[bool]:
    """Whether the parser took the graph; weights are at hand as long as the context is open."""
    if hasattr(trt.OnnxParser, "load_initializer"):  # TensorRT 10.3 has it not
        from .streaming import parsed

        return parsed(parser, model, path)
    return nullcontext(parser.parse(model, path))


def _write(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, out: BinaryIO) -> int:
    """Builds into `out`; the bytes written, 0 where the build failed. Raises what `out` raises."""
    if hasattr(trt.Builder, "build_serialized_network_to_stream"):
        from .streaming import write

        return write(builder, network, config, out)
    plan = builder.build_serialized_network(network, config)
    # Memory of TensorRT, which has the buffer protocol; the bindings' types do not say so.
    return 0 if plan is None else out.write(cast(Any, plan))
