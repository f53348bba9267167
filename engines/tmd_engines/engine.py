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
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol

from .bundle import Bundle
from .cpu import describe_cpu
from .errors import EngineError, quote
from .manifest import TensorSpec

Buffer = Any  # a numpy array on the CPU; other engines may have device buffers


class Step(Protocol):
    """A run of one graph on bound buffers. Calling it returns when the outputs are written. Raises EngineError."""

    def __call__(self) -> None: ...


class Engine(ABC):
    """A graph ready to run, by one thread at a time. `inputs` and `outputs` map tensor names to `TensorSpec`."""

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

    @abstractmethod
    def close(self) -> None:
        """Frees the graph's memory now. Its steps raise EngineError from then on. Closing twice is fine."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


# name -> (module, class); None: the name is known, and its implementation comes with a later version.
_IMPLEMENTATIONS: dict[str, tuple[str, str] | None] = {
    "onnxruntime": ("onnxruntime_engine", "OnnxRuntimeEngine"),
    "openvino": ("openvino_engine", "OpenVinoEngine"),
    "tensorrt": None,
}
ENGINE_NAMES = ("auto", *_IMPLEMENTATIONS)


def load(bundle: Bundle, graph: str, engine: str = "auto", device: str = "cpu", threads: int | None = None) -> Engine:
    """Makes a graph of a bundle executable.

    `engine` is one of `ENGINE_NAMES`; "auto" is decided by `choose_engine`.
    `threads` is the number of CPU threads of one run, None for as many as there are physical cores.
    Raises EngineError if the graph, the engine or the device is not to be had (and says what to do), BundleError if the
    file changed since the bundle was opened.
    """
    check_engine(engine)
    if engine == "auto":
        engine = choose_engine(bundle, graph)
    implementation = _IMPLEMENTATIONS[engine]
    assert implementation is not None  # check_engine has refused those
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise EngineError(f"threads is {quote(threads)}: give a whole number from 1 to 1024, or None for all cores.")
    module, name = implementation
    loaded: Engine = getattr(import_module(f".{module}", __package__), name)(bundle, graph, device, threads)
    return loaded


def check_engine(engine: str) -> None:
    """Raises EngineError unless `engine` is a name that this version of tmd has something behind."""
    if engine not in ENGINE_NAMES:
        raise EngineError(f"There is no engine {quote(engine)}. Choose one of: {', '.join(ENGINE_NAMES)}.")
    if engine != "auto" and not is_implemented(engine):
        ready = ", ".join(name for name, found in _IMPLEMENTATIONS.items() if found)
        raise EngineError(f"The engine {engine} comes with a later version of tmd. Use one of: auto, {ready}.")


def choose_engine(bundle: Bundle, graph: str) -> str:
    """What "auto" means for a graph on a CPU, by what was measured (docs/speed.md); imports no engine to find out.

    OpenVINO for a bf16 graph where it is installed and the CPU multiplies bfloat16, which is twice as fast as float32
    there and which ONNX Runtime cannot do. ONNX Runtime for everything else: OpenVINO was 1.0 to 1.6 times as fast in
    float32, and takes several times as long to get ready. Raises EngineError if the bundle has no such graph.
    """
    if bundle.graph_info(graph).precision == "bf16" and find_spec("openvino") is not None:
        features = describe_cpu()["features"] or ()
        if "avx512_bf16" in features or "amx_bf16" in features:
            return "openvino"
    return "onnxruntime"


def is_implemented(engine: str) -> bool:
    """Whether this version of tmd can load graphs on `engine`."""
    return _IMPLEMENTATIONS.get(engine) is not None
