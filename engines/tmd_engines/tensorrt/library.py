"""TensorRT and TensorRT for RTX: one API, and here is what differs between the two libraries. Nothing else asks which.

    TensorRT          server cards and Jetson; builds on the GPU that runs; a timing cache speeds up the next build
    TensorRT for RTX  consumer cards; builds without a GPU, for one or several compute capabilities; compiles its
                      kernels when a plan first runs, and keeps them in a runtime cache

A process uses one of them (`use`): both bring symbols of the same names. `tests/unit/engines/test_tensorrt_contract.py`
holds what is called here to NVIDIA's own bindings of both.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import EngineError

if TYPE_CHECKING:
    import tensorrt as trt
    import tensorrt_rtx as rtx

    from .settings import BuildSettings
else:
    trt = rtx = None  # set by `use`

__all__ = ["FOR_RTX", "TENSORRT", "TensorRt", "TensorRtForRtx", "trt", "use", "used"]

Saved = Callable[[], "bytes | None"]  # what a library wants kept for the next time; None: nothing


class TensorRt:
    """TensorRT 10 and 11. `name` is that of the engine, `module` what is imported, `title` what people call it."""

    name = "tensorrt"
    module = "tensorrt"
    title = "TensorRT"
    install = "pip install '.[tensorrt]' (on a Jetson it comes with JetPack)"
    needs_gpu_to_build = True
    driver = 525  # the oldest that can be enough: of TensorRT 10 for CUDA 12

    def version(self) -> str:
        """As the library states it."""
        return str(trt.__version__)

    def operators(self) -> tuple[int, int]:
        """Major and minor version of the TensorRT whose operators the parser of this library takes."""
        major, minor, *_ = self.version().split(".")
        return int(major), int(minor)

    def configure(self, config: Any, settings: BuildSettings, timing: bytes | None) -> Saved:
        """Sets what only this library has. `timing` is what an earlier build returned; the answer is for the next."""
        configuration: trt.IBuilderConfig = config
        cache = configuration.create_timing_cache(timing or b"")
        if not configuration.set_timing_cache(cache, False):  # of another device or version
            cache = configuration.create_timing_cache(b"")
            configuration.set_timing_cache(cache, False)
        return lambda: _bytes(cache.serialize())

    def context(self, engine: Any, kernels: bytes | None) -> tuple[Any, Saved]:
        """An execution context without scratch memory of its own, and what to keep once it has run."""
        made: trt.ICudaEngine = engine
        return made.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED), lambda: None

    def not_capturable(self, context: Any, stream: int) -> str | None:
        """Why runs of this context cannot be recorded as a CUDA graph; None: they can."""
        return None

    def refusal(self, runtime: Any, plan: Any) -> str | None:
        """Why a plan cannot run on this GPU, as far as the library tells before it loads it."""
        return None


class TensorRtForRtx(TensorRt):
    """TensorRT for RTX 1.x."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    title = "TensorRT for RTX"
    install = "pip install '.[rtx]'"
    needs_gpu_to_build = False
    driver = 580  # of CUDA 13

    def operators(self) -> tuple[int, int]:
        """Its parser is that of TensorRT 11."""
        return 11, 0

    def configure(self, config: Any, settings: BuildSettings, timing: bytes | None) -> Saved:
        """Capabilities, and scratch memory from us, without which a stream cannot be recorded. It has no timing cache
        that does anything."""
        configuration: rtx.IBuilderConfig = config
        configuration.set_flag(rtx.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if settings.targets:
            configuration.num_compute_capabilities = len(settings.targets)
            for number, target in enumerate(settings.targets):
                capability = getattr(rtx.ComputeCapability, "SM" + target.replace(".", ""))
                if not configuration.set_compute_capability(capability, number):
                    raise EngineError(f"{self.title} {self.version()} does not build for compute capability {target}.")
        return lambda: None

    def context(self, engine: Any, kernels: bytes | None) -> tuple[Any, Saved]:
        """Kernels for these sizes are compiled at once: recordings are void when others take their place later."""
        made: rtx.ICudaEngine = engine
        config = made.create_runtime_config()
        config.set_execution_context_allocation_strategy(rtx.ExecutionContextAllocationStrategy.USER_MANAGED)
        config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = rtx.CudaGraphStrategy.DISABLED  # whole outer steps are recorded by us
        cache: Any = config.create_runtime_cache()  # the bindings' types have no name for what this returns
        if kernels is not None:
            cache.deserialize(kernels)  # False: of another version or driver, and it stays empty
        config.set_runtime_cache(cache)
        return made.create_execution_context(runtime_config=config), lambda: _bytes(cache.serialize())

    def not_capturable(self, context: Any, stream: int) -> str | None:
        made: rtx.IExecutionContext = context
        if made.is_stream_capturable(stream):
            return None
        return f"{self.title} says that runs of this graph cannot be recorded"

    def refusal(self, runtime: Any, plan: Any) -> str | None:
        made: rtx.Runtime = runtime
        validity, diagnostics = made.get_engine_validity(plan)
        if validity != rtx.EngineValidity.INVALID:
            return None
        names = {
            rtx.EngineInvalidityDiagnostics.VERSION_MISMATCH: "it is of another version",
            rtx.EngineInvalidityDiagnostics.UNSUPPORTED_CC: "it is for other compute capabilities",
            rtx.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER: "the driver is too old, or there is none",
            rtx.EngineInvalidityDiagnostics.OLD_CUDA_RUNTIME: "the CUDA runtime is too old",
            rtx.EngineInvalidityDiagnostics.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory",
            rtx.EngineInvalidityDiagnostics.MALFORMED_ENGINE: "it is damaged",
            rtx.EngineInvalidityDiagnostics.CUDA_ERROR: "CUDA does not work",
        }
        found = [text for flag, text in names.items() if int(diagnostics) & int(flag)]
        return " and ".join(found) or None  # without a driver it names no reason, and loading the plan does


TENSORRT, FOR_RTX = TensorRt(), TensorRtForRtx()
_used: TensorRt | None = None


def use(library: TensorRt) -> None:
    """Makes a library that of this process. Raises EngineError if it cannot be imported, or another is in use."""
    global trt, rtx, _used
    if _used is library:
        return
    if _used is not None:
        raise EngineError(
            f"This process uses {_used.title}, and one process uses one TensorRT: start another one for "
            f"{library.title}, or choose one of the two engines for all graphs."
        )
    try:
        trt = import_module(library.module)
    except (ImportError, OSError) as error:
        raise EngineError(
            f"The engine {library.name} cannot be imported ({error}). Install it: {library.install}"
        ) from None
    rtx, _used = trt, library


def used() -> TensorRt:
    """The library of this process, after `use`."""
    if _used is None:
        raise RuntimeError("no TensorRT is in use yet")
    return _used


def _bytes(memory: Any) -> bytes:
    """Memory of TensorRT has the buffer protocol; the bindings' types do not say so."""
    return bytes(memory)
