"""A lowered graph -> a TensorRT plan. One strongly typed path for TensorRT 10 and 11: types are those of the graph.

Names that came or went between versions are asked for where they are used;
`tests/unit/engines/test_tensorrt_contract.py` holds this module against NVIDIA's own bindings of several versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import tensorrt as trt

from ..errors import EngineError
from .progress import BuildProgress

_KEPT_MESSAGES = 3


@dataclass(frozen=True)
class BuildSettings:
    """What a build depends on beside the graph, the sizes and the device. `workspace` in bytes; None: no limit."""

    workspace: int | None = None
    weight_streaming: bool = False

    def flags(self) -> str:
        """For the key of the plan: every setting, and what `build` always sets."""
        return f"workspace {self.workspace}, weight streaming {self.weight_streaming}, no TF32"


class Log(trt.ILogger):
    """Keeps the latest errors of TensorRT, to say them in ours; prints nothing."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)  # pybind11 wants it by name
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any thread."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors = [*self.errors, " ".join(msg.split())][-_KEPT_MESSAGES:]

    def said(self) -> str:
        """The latest errors as the end of a sentence, and forgets them."""
        said, self.errors = "; ".join(self.errors)[:600], []
        return said or "it gave no reason"


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


def version() -> tuple[int, int]:
    """Major and minor version of the library."""
    major, minor, *_ = trt.__version__.split(".")
    return int(major), int(minor)


def full_version() -> str:
    """The version as the library states it."""
    return trt.__version__


def new_builder(log: Log) -> trt.Builder:
    """A builder. Raises EngineError where the bindings are there and the libraries or the driver are not."""
    try:
        return trt.Builder(log)
    except TypeError:  # what pybind11 makes of a null pointer
        raise EngineError(f"TensorRT {trt.__version__} does not start: {log.said()}. See tmd-engine doctor.") from None


def build(
    model: bytes,
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    settings: BuildSettings,
    timing: bytes | None,
    progress: BuildProgress,
) -> tuple[bytes, bytes]:
    """The plan of a graph for inputs of these shapes, and the timing cache to give to the next build.

    `model` is the serialized graph, `path` a file beside which its external data lies. `timing` is an earlier cache,
    which TensorRT ignores where it does not fit. Raises EngineError saying what TensorRT said, or whatever `progress`
    raised.
    """
    log = Log()
    builder = new_builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model, path):
        said = "; ".join(str(parser.get_error(number).desc()) for number in range(parser.num_errors))
        raise EngineError(f"TensorRT {trt.__version__} cannot read {path}: {said[:600] or log.said()}")

    config = builder.create_builder_config()
    # On by default: products of float32 would lose 13 of their 23 bits.
    config.clear_flag(trt.BuilderFlag.TF32)
    if settings.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    monitor = _Monitor(progress)  # TensorRT does not keep it alive
    config.progress_monitor = monitor
    cache = config.create_timing_cache(timing or b"")
    if not config.set_timing_cache(cache, False):  # of another device or version
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    profile = builder.create_optimization_profile()
    for name, shape in shapes.items():
        size = trt.Dims(list(shape))
        profile.set_shape(name, size, size, size)
    if config.add_optimization_profile(profile) < 0:
        raise EngineError(f"TensorRT {trt.__version__} refuses the sizes {dict(shapes)} for {path}: {log.said()}")

    plan = builder.build_serialized_network(network, config)
    if progress.stopped is not None:
        raise progress.stopped
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot build {path}: {log.said()}")
    # Both are memory of TensorRT, which has the buffer protocol; the bindings' types do not say so.
    return bytes(cast(Any, plan)), bytes(cast(Any, cache.serialize()))


class Plan:
    """A plan made executable on the stream of this process. Raises EngineError if TensorRT does not take it.

    Only plans from this user's own cache come here, and even these may not bring host code: `engine_host_code_allowed`
    stays off.
    """

    def __init__(self, content: bytes, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._log = Log()
        try:
            self._runtime = trt.Runtime(self._log)
        except TypeError:
            raise EngineError(f"TensorRT {trt.__version__} does not start: {self._log.said()}.") from None
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise EngineError(f"TensorRT {trt.__version__} refuses the plan: {self._log.said()}.")
        if self._engine.streamable_weights_size:
            # What is left of the memory, as TensorRT sees it; before a context is made, not after.
            self._engine.weight_streaming_budget_v2 = self._engine.get_weight_streaming_automatic_budget()
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"TensorRT {trt.__version__} has no memory to run the plan: {self._log.said()}.")
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"TensorRT {trt.__version__} refuses {name} of {list(shape)}: {self._log.said()}.")

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Asks for a run with the tensors at these addresses of the device. Raises EngineError."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the address of {name}: {self._log.said()}.")
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"TensorRT failed: {self._log.said()}.")
