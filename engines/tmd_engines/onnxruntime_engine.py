"""ONNX Runtime on the CPU: the engine that runs anywhere, and the one the others are compared with."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import numpy as np

from .bundle import Bundle
from .engine import Engine
from .errors import EngineError, quote
from .graph_file import parse_graph
from .lowering import attention_to_multi_head_attention
from .manifest import TensorSpec

# The CPU provider has no bfloat16 kernels; fp8 and int8 graphs need session options and tests of their own first.
_PRECISIONS = ("fp32", "fp16")


class OnnxRuntimeEngine(Engine):
    """One ONNX Runtime session. Buffers are C-contiguous numpy arrays; nothing is copied in or out."""

    def __init__(self, bundle: Bundle, graph: str, device: str, threads: int | None) -> None:
        info = bundle.graph_info(graph)
        super().__init__(graph, info.inputs, info.outputs)
        if device != "cpu":
            raise EngineError(
                f"The engine onnxruntime runs on device cpu, not on {quote(device)}, in this version of tmd."
            )
        if info.precision not in _PRECISIONS:
            raise EngineError(
                f"Graph {graph} is {info.precision}, and ONNX Runtime on a CPU computes {' and '.join(_PRECISIONS)}: "
                "use a bundle in fp32."
            )
        if any(spec.dtype == "bfloat16" for spec in (*info.inputs, *info.outputs)):
            raise EngineError(
                f"Graph {graph} has bfloat16 inputs or outputs, which numpy has not: use a bundle in fp32."
            )
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(
                f"The engine onnxruntime cannot be imported ({error}). Install it: pip install onnxruntime"
            ) from None
        self._session = _open_session(onnxruntime, bundle, graph, threads)
        self._steps: weakref.WeakSet[_BoundStep] = weakref.WeakSet()

    def empty(self, name: str, **dims: int) -> np.ndarray:
        """Uninitialised C-contiguous array for the input or output `name`. Raises EngineError."""
        shape = self.shape(name, **dims)
        return np.empty(shape, np.dtype((self.inputs.get(name) or self.outputs[name]).dtype))

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> _BoundStep:
        """See `Engine.bind`. Sizes that only the graph can relate (tokens to height) are errors of the step."""
        if self._session is None:
            raise EngineError(f"The engine of graph {self.graph} is closed: load the graph again.")
        self._check_buffers(inputs, outputs)
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        step = _BoundStep(self.graph, self._session, binding, (dict(inputs), dict(outputs)))
        self._steps.add(step)
        return step

    def close(self) -> None:
        """See `Engine.close`."""
        for step in self._steps:
            step.release()
        self._steps.clear()
        self._session = None

    def _check_buffers(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        sizes: dict[str, tuple[int, str]] = {}  # symbol -> its value, and the tensor that set it
        for kind, buffers, specs in (("input", inputs, self.inputs), ("output", outputs, self.outputs)):
            wrong = [f"misses the {kind} {name}" for name in specs if name not in buffers]
            wrong += [f"has no {kind} {quote(name)}" for name in buffers if name not in specs]
            if wrong:
                raise EngineError(f"Graph {self.graph} {wrong[0]}: bind every {kind}, and nothing else, by its name.")
            for name, array in buffers.items():
                problem = _buffer_problem(array, specs[name], kind) or _size_problem(array, specs[name], sizes)
                if problem:
                    raise EngineError(f"The {kind} {name} of graph {self.graph} {problem}.")
        for name, other in _overlaps(inputs, outputs):
            raise EngineError(
                f"The output {name} of graph {self.graph} shares memory with {other}, and it is written while that is "
                "still in use: give it a buffer of its own."
            )


class _BoundStep:
    """Holds what a bound run needs. ONNX Runtime has only the addresses of the buffers, so they are kept alive here."""

    __slots__ = ("__weakref__", "_binding", "_buffers", "_graph", "_run")

    def __init__(self, graph: str, session: Any, binding: Any, buffers: object) -> None:
        self._graph, self._run, self._binding, self._buffers = graph, session.run_with_iobinding, binding, buffers

    def __call__(self) -> None:
        try:
            self._run(self._binding)
        except Exception as error:
            self._fail(error)

    def release(self) -> None:
        self._run = self._binding = self._buffers = None

    def _fail(self, error: Exception) -> NoReturn:
        if self._run is None:
            raise EngineError(f"The engine of graph {self._graph} was closed: load the graph again.") from None
        raise EngineError(f"ONNX Runtime failed in graph {self._graph}: {_one_line(error)}") from error


def _open_session(onnxruntime: Any, bundle: Bundle, graph: str, threads: int | None) -> Any:
    """The lowered graph as a session. Its weights stay in the bundle's data file, which ONNX Runtime maps."""
    path = bundle.graph_path(graph)
    model = parse_graph(bundle.read_graph(graph), str(path))
    model.DiscardUnknownFields()  # what our checks could not see, ONNX Runtime shall not see either
    attention_to_multi_head_attention(model)

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; they come as exceptions too
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.folder))
    # The graphs of a bundle run in turn: idle threads of one must not take the cores from the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {_one_line(error)}") from error


def _buffer_problem(array: object, spec: TensorSpec, kind: str) -> str | None:
    if not isinstance(array, np.ndarray):
        return f"is a {type(array).__name__}: give a numpy array, for example from engine.empty"
    if array.dtype != np.dtype(spec.dtype):
        return f"has dtype {array.dtype}, and the graph needs {spec.dtype}: convert it, or use engine.empty"
    if not (array.flags.c_contiguous and array.flags.aligned):
        return "is not C-contiguous and aligned, and an engine reads plain memory: pass a copy of it"
    if kind == "output" and not array.flags.writeable:
        return "is read-only: give a writable array"
    return None


def _size_problem(array: np.ndarray, spec: TensorSpec, sizes: dict[str, tuple[int, str]]) -> str | None:
    """Compares the shape with the spec, and every symbol with what an earlier tensor made of it."""
    wanted = f"has shape {list(array.shape)}, and the graph needs [{', '.join(map(str, spec.shape))}]"
    if array.ndim != len(spec.shape):
        return wanted
    for size, (factor, symbol) in zip(array.shape, spec.factors(), strict=True):
        if symbol is None:
            if size != factor:
                return wanted
        elif size < 1 or size % factor:
            return wanted
        else:
            known, owner = sizes.setdefault(symbol, (size // factor, spec.name))
            if known != size // factor:
                return f"{wanted}, where {symbol} is {known} by the shape of {owner}"
    return None


def _overlaps(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """(output, other tensor) that share memory. Arrays are contiguous, so each is one interval of addresses."""
    spans = sorted(
        (array.ctypes.data, array.ctypes.data + array.nbytes, is_output, name)
        for is_output, buffers in ((False, inputs), (True, outputs))
        for name, array in buffers.items()
    )
    furthest: dict[bool, tuple[int, str]] = {False: (0, ""), True: (0, "")}  # end and name of the longest span so far
    for start, end, is_output, name in spans:
        for other_is_output, (other_end, other) in furthest.items():
            if start < other_end and (is_output or other_is_output):
                yield (name, other) if is_output else (other, name)
        furthest[is_output] = max(furthest[is_output], (end, name))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
