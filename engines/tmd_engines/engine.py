"""The interface of all engines: one graph, made executable on one device, on buffers that the caller owns.

    engine = load(bundle, "backbone")
    inputs = {name: engine.empty(name, batch=1, frames=5, ...) for name in engine.inputs}
    outputs = {name: engine.empty(name, batch=1, frames=5, ...) for name in engine.outputs}
    step = engine.bind(inputs, outputs)
    ...write into the inputs...
    step()                                    # results are in the outputs

An implementation is a module of this package that is imported only when it is asked for (`_IMPLEMENTATIONS`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from .bundle import Bundle
from .cpu import describe_cpu
from .errors import EngineError, quote
from .gpu import has_onnxruntime_cuda, has_tensorrt, split_device
from .manifest import TensorSpec

if TYPE_CHECKING:
    from .device_engine import Progress

Buffer = Any  # a numpy array on the CPU; other engines may have device buffers


class Step(Protocol):
    """A run of one graph on bound buffers. Calling it returns when the outputs are written. Raises EngineError."""

    def __call__(self) -> None: ...


class Engine(ABC):
    """A graph ready to run, by one thread at a time. `inputs` and `outputs` map tensor names to `TensorSpec`."""

    buffer_type: type | None = None  # of the buffers from `empty`; None: numpy arrays, as every engine takes them
    records = False  # whether several steps can be one launch

    def __init__(self, graph: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.graph = graph
        self.inputs: dict[str, TensorSpec] = {spec.name: spec for spec in inputs}
        self.outputs: dict[str, TensorSpec] = {spec.name: spec for spec in outputs}

    def shape(self, name: str, **dims: int) -> tuple[int, ...]:
        """Shape of an input or output with its symbols (`batch=1, height=8`) filled in; others in `dims` are ignored.

        Raises EngineError for an unknown name, a symbol without a value, or a value that is not a positive int.
        """
        spec = self.inputs.get(name) or self.outputs.get(name)
        if spec is None:
            known = ", ".join((*self.inputs, *self.outputs))
            raise EngineError(
                f"Graph {self.graph} has no input or output {quote(name)}; it has {quote(known, 400)[1:-1]}."
            )
        try:
            shape = spec.resolve(**dims)
        except KeyError as error:
            shown = ", ".join(map(str, spec.shape))
            raise EngineError(
                f"{name} of graph {self.graph} has shape [{shown}]: give a value for {error.args[0]} as well."
            ) from None
        if any(not hasattr(size, "__index__") or size < 1 for size in shape):
            raise EngineError(
                f"{name} of graph {self.graph} cannot have shape {list(shape)}: every dimension must be a whole number "
                "of at least 1."
            )
        return tuple(map(int, shape))

    @abstractmethod
    def empty(self, name: str, **dims: int) -> Buffer:
        """An uninitialised buffer for the input or output `name`; `dims` as for `shape`. Raises EngineError."""

    @abstractmethod
    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Step:
        """Ties the graph to buffers, all inputs and all outputs by name, and checks them once, here.

        The step keeps the buffers alive. An output may not share memory with an input or another output; inputs may.
        Raises EngineError for a missing or unknown name, or a buffer of wrong dtype, shape or layout.
        """

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """`bind` and one call. For repeated calls on the same buffers keep the step of `bind` instead."""
        self.bind(inputs, outputs)()

    def record(self, work: Callable[[], None]) -> Step:
        """`work` as one launch, where `records` is True; elsewhere `work` itself.

        `work` calls steps of this engine, and of others of its kind, and nothing else; each graph has run before. What
        is recorded stays good as long as its steps do, and reads and writes their buffers. Raises EngineError.
        """
        return work

    @abstractmethod
    def close(self) -> None:
        """Frees the graph's memory now. Its steps raise EngineError from then on. Closing twice is fine."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# engine -> device -> (module, class)
_IMPLEMENTATIONS: dict[str, dict[str, tuple[str, str]]] = {
    "onnxruntime": {
        "cpu": ("onnxruntime_engine", "OnnxRuntimeEngine"),
        "cuda": ("onnxruntime_device", "OnnxRuntimeDeviceEngine"),
    },
    "openvino": {"cpu": ("openvino_engine", "OpenVinoEngine")},
    "tensorrt": {"cuda": ("tensorrt_engine", "TensorRtEngine")},
}
ENGINE_NAMES = ("auto", *_IMPLEMENTATIONS)
DEVICE_NAMES = ("auto", "cpu", "cuda")  # and "cuda:N"


def load(
    bundle: Bundle,
    graph: str,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Makes a graph of a bundle executable.

    `engine` is one of `ENGINE_NAMES`, `device` one of `DEVICE_NAMES` or "cuda:N", which is GPU N of those that
    CUDA_VISIBLE_DEVICES leaves, from 0 on; "auto" is decided by `choose`. `threads` is the number of CPU threads of one
    run, None for as many as there are physical cores. `progress` is called while an engine compiles, which TensorRT
    does for minutes, when buffers are bound.
    Raises EngineError if the graph, the engine or the device is not to be had (and says what to do), BundleError if the
    file changed since the bundle was opened.
    """
    engine, device = choose(bundle, graph, engine, device)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise EngineError(f"threads is {quote(threads)}: give a whole number from 1 to 1024, or None for all cores.")
    module, name = _IMPLEMENTATIONS[engine][split_device(device)[0]]
    more = {} if device == "cpu" else {"progress": progress}
    loaded: Engine = getattr(import_module(f".{module}", __package__), name)(bundle, graph, device, threads, **more)
    return loaded


def check_engine(engine: str, device: str = "auto") -> None:
    """Raises EngineError unless `engine` and `device` are names that go together."""
    kind, _ = split_device(device)
    if engine not in ENGINE_NAMES:
        raise EngineError(f"There is no engine {quote(engine)}. Choose one of: {', '.join(ENGINE_NAMES)}.")
    if kind not in DEVICE_NAMES:
        raise EngineError(
            f"There is no device {quote(device)}. Choose one of: {', '.join(DEVICE_NAMES)}, cuda:N (N from 0)."
        )
    if engine != "auto" and kind != "auto" and kind not in _IMPLEMENTATIONS[engine]:
        raise EngineError(
            f"The engine {engine} runs on device {' or '.join(_IMPLEMENTATIONS[engine])}, not on {device}: choose "
            "another engine or device, or leave one of them to auto."
        )


def choose(bundle: Bundle, graph: str, engine: str = "auto", device: str = "auto") -> tuple[str, str]:
    """Engine and device for a graph, where "auto" leaves them open. A number of the device is kept.

    With an NVIDIA GPU and the libraries for it: TensorRT, then ONNX Runtime on the GPU. ONNX Runtime asked for by name
    stays on the CPU unless the device is asked for as well. Otherwise `choose_engine`. Raises EngineError.
    """
    check_engine(engine, device)
    if engine == "auto" and device != "cpu":
        info = bundle.graph_info(graph)
        precision = info.precision
        on_gpu = "cuda" if device == "auto" else device
        if has_tensorrt() and info.storage != "int8":  # blocks of int8 are nothing that TensorRT reads
            return "tensorrt", on_gpu
        if has_onnxruntime_cuda() and precision in ("fp32", "fp16", "bf16"):
            return "onnxruntime", on_gpu
        if device != "auto":
            raise EngineError(
                f"There is no engine for device {device} here: tmd-engine doctor says what is missing. Without a GPU, "
                "leave the device to auto."
            )
    if engine == "auto":
        engine = choose_engine(bundle, graph)
    return engine, next(iter(_IMPLEMENTATIONS[engine])) if device == "auto" else device


def choose_engine(bundle: Bundle, graph: str) -> str:
    """The engine for a graph on a CPU, by what was measured (docs/speed.md); imports no engine to find out.

    OpenVINO for a bf16 graph where it is installed and the CPU multiplies bfloat16, which is twice as fast as float32
    there and which ONNX Runtime cannot do, and for an int8 graph where the CPU multiplies int8. ONNX Runtime for
    everything else: OpenVINO was 1.0 to 1.6 times as fast in float32, and takes several times as long to get ready.
    Raises EngineError if the bundle has no such graph.
    """
    wanted = _OPENVINO_IS_FASTER_WITH.get(bundle.graph_info(graph).precision, ())
    if wanted and find_spec("openvino") is not None and {*wanted} & {*(describe_cpu()["features"] or ())}:
        return "openvino"
    return "onnxruntime"


# precision -> features of a CPU, any of which is enough
_OPENVINO_IS_FASTER_WITH = {
    "bf16": ("avx512_bf16", "amx_bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}
