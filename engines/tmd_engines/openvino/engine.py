"""OpenVINO on the CPU: a graph is compiled for the sizes it is bound to, and computes in the types it is written in.

`numeric_properties` is all that influences the numbers, beside the graph, the sizes and the number of threads. With
the hint f32 OpenVINO demotes nothing (by default, on a CPU with bfloat16 products, it computes fp32 graphs in
bfloat16), while nodes that the graph types as bfloat16 use the CPU's bfloat16 units.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from math import prod
from pathlib import Path
from tempfile import gettempdir
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .. import unfinished
from ..bundle.graph_file import parse_graph
from ..bundle.reader import Bundle, format_size
from ..cache_folder import cache_folder, distrust
from ..device.buffers import check_buffers, check_cpu_graph, empty_array
from ..device.cpu import SMALL_BYTES, cpu_key, describe_cpu
from ..device.numbers import decimal_point
from ..device.paths import utf8_name
from ..device.plan_cache import PlanCache
from ..device.resident_pages import Range, dropping, mapped_ranges
from ..device.running import RUNNING
from ..engine import Engine
from ..errors import BundleError, EngineError, one_line, quote
from ..holding import OPENVINO

if TYPE_CHECKING:
    from ..bundle.sections import GraphInfo, TensorSpec

Shapes = tuple[tuple[int, ...], ...]

KEPT_BYTES = 64 << 20  # of a graph and its weights; a larger one compiles as fast as it is read back
REMARKED_BYTES = 256 << 20  # what takes seconds to compile
CHECKED_BYTES = 64 << 20  # of the inputs with which a compiled graph is checked, which runs it twice

# precision -> features of a CPU, any of which makes this engine the fastest
_FASTER_WITH = {
    "fp16": ("avx512f",),
    "bf16": ("amx_bf16", "avx512_bf16"),
    "int8": ("avx512_vnni", "avx_vnni", "amx_int8"),
}


def numeric_properties() -> dict[str, str]:
    """The settings of OpenVINO's CPU plugin that change results. Another host of the same engine must set the same."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",  # default 32: activations beside int8 weights would become int8 too
    }


def compile_properties(threads: int | None) -> dict[str, str]:
    """All settings of a compiled graph. Without `threads` OpenVINO takes the cores that this process may use."""
    properties = {
        **numeric_properties(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        # The graphs of a bundle run in turn, beside a video encoder: none may hold on to certain cores.
        "ENABLE_CPU_PINNING": "NO",
    }
    return properties if threads is None else {**properties, "INFERENCE_NUM_THREADS": str(threads)}


def _is_of_frames(info: GraphInfo) -> bool:
    return any(spec.name == "frames" for spec in (*info.inputs, *info.outputs))


class OpenVinoEngine(Engine):
    """One graph, compiled once per combination of input shapes. Buffers are numpy arrays; nothing is copied.

    Static shapes are worth a compilation: 1.2 to 1.8 times as fast as one graph for all sizes (docs/speed.md). Only the
    length of prompts that keep their own is left open, which costs nothing (docs/tim-log.md). The latest compiled graph
    is kept, and those of older sizes as long as a step uses them.
    """

    precisions = ("fp32", "fp16", "bf16", "int8", "fp8")
    shares = True
    package, install = "openvino", "pip install openvino"
    holding = OPENVINO

    @classmethod
    def prefers(cls, info: GraphInfo, size: int) -> bool:
        """For a bf16 graph where the CPU multiplies bfloat16, which is twice as fast as float32 there and which ONNX
        Runtime cannot do, for an int8 graph where it multiplies int8, and for a large fp16 encoder or decoder, which
        both compute in float32. Small ones in float32 are 1.0 to 1.6 times as fast as with ONNX Runtime, and take
        several times as long to get ready. A transformer in fp16 takes four times its file's size here, and one in ONNX
        Runtime."""
        if info.precision == "fp16" and (size <= SMALL_BYTES or not _is_of_frames(info)):
            return False
        return bool({*_FASTER_WITH.get(info.precision, ())} & {*(describe_cpu()["features"] or ())})

    @classmethod
    def note(cls) -> str:
        """How this CPU computes bf16 graphs, and where compiled graphs are kept."""
        features = describe_cpu()["features"] or ()
        units = [feature for feature in _FASTER_WITH["bf16"] if feature in features]
        folder = cache_folder()
        kept = "off" if folder is None else (folder.exists() and distrust(folder)) or str(folder)
        return f"bf16 graphs in {f'bfloat16 ({units[0]})' if units else 'float32'}, compiled graphs kept: {kept}"

    def __init__(self, bundle: Bundle, graph: str, device: str, threads: int | None) -> None:
        info = bundle.graph_info(graph)
        super().__init__(graph, info.inputs, info.outputs)
        check_cpu_graph("openvino", device, graph, info, self.precisions)
        try:
            import openvino
        except ImportError as error:
            raise EngineError(
                f"The engine openvino cannot be imported ({error}). Install it: pip install openvino"
            ) from None
        self._openvino, self._bundle = openvino, bundle
        self._properties = compile_properties(threads)
        with decimal_point():
            self._model, self._weights = _read_model(openvino, bundle, graph)
        files = [bundle.manifest.files[name] for name in (info.file, info.data) if name]
        text = bundle.manifest.text
        self._longest = text.max_length if text.tokenization == "plain" else None
        self._key = _base_key(openvino, [file.sha256 for file in files], self._properties)
        size = sum(file.size for file in files)
        if size > REMARKED_BYTES:
            self.remark = (
                f"OpenVINO compiles {graph} anew in every process: it has {format_size(size)}, and compiled graphs of "
                f"at most {format_size(KEPT_BYTES)} are kept. Several prompts in one run are compiled for once."
            )
        # Beside the weights in their file, an entry holds a second copy of them.
        self._plans = PlanCache(cache_folder() if size <= KEPT_BYTES else None)
        self._compiled: weakref.WeakValueDictionary[Shapes, Any] = weakref.WeakValueDictionary()
        self._latest: Any = None
        self._binding = Lock()
        self._steps: weakref.WeakSet[_BoundStep] = weakref.WeakSet()

    def empty(self, name: str, **dims: int) -> np.ndarray:
        """Uninitialised C-contiguous array for the input or output `name`. Raises EngineError."""
        return empty_array(self, name, dims)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> _BoundStep:
        """See `Engine.bind`. Compiles the graph when these sizes are new; sizes that do not fit together fail here."""
        model = self._model  # it keeps the mapping whose pages are dropped below, whoever closes this engine meanwhile
        if model is None:
            raise EngineError(f"The engine of graph {self.graph} is closed: load the graph again.")
        check_buffers(self, inputs, outputs)
        sizes = tuple(tuple(inputs[name].shape) for name in self.inputs)
        shapes = tuple(map(self._opened, self.inputs.values(), sizes))
        with self._binding:
            compiled = self._compiled.get(shapes)
            if compiled is None:
                self._latest = None  # two compiled copies of a large model do not fit side by side
                with decimal_point(), dropping(self._weights):  # OpenVINO packs them into memory of its own
                    compiled = self._compiled[shapes] = self._compile(model, shapes, sizes)
            self._latest = compiled
        try:
            request = compiled.create_infer_request()
            for name, array in (*inputs.items(), *outputs.items()):
                request.set_tensor(name, self._openvino.Tensor(_writable(array), shared_memory=True))
        except Exception as error:
            self._fail("cannot bind", sizes, error)
        step = _BoundStep(self.graph, request, (dict(inputs), dict(outputs), compiled))
        self._steps.add(step)
        return step

    def close(self) -> None:
        """See `Engine.close`."""
        for step in self._steps:
            step.release()
        self._steps.clear()
        self._latest = self._model = None

    def _opened(self, spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that an input is compiled for: -1 where any number of text tokens will do."""
        if self._longest is None:
            return shape
        return tuple(-1 if symbol == "text" else size for (_, symbol), size in zip(spec.factors(), shape, strict=True))

    def _compile(self, read: Any, shapes: Shapes, sizes: Shapes) -> Any:
        """The graph that was `read` for these shapes, from the cache if it is there; `sizes` are without open lengths.

        A graph for any length is not kept: the check of a plan is one of a single length, and at 1 a rotary embedding
        that is lost does not show. One with large inputs is not kept either, as the check would take longer.
        """
        key = {**self._key, "shapes": str(shapes)}
        given = sum(
            prod(shape) * np.dtype(spec.dtype).itemsize for spec, shape in zip(self.inputs.values(), sizes, strict=True)
        )
        kept = shapes == sizes and given <= CHECKED_BYTES
        plan = self._plans.load(key) if kept else None
        if plan:
            try:
                return _core().import_model(plan, "CPU", self._properties)
            except Exception:
                plan = None  # an entry that OpenVINO does not take is rebuilt
        try:
            model = read.clone()
            open_length = self._openvino.Dimension(1, self._longest or -1)
            partial = [[open_length if size < 0 else size for size in shape] for shape in shapes]
            model.reshape(dict(zip(self.inputs, partial, strict=True)))
            compiled = _core().compile_model(model, "CPU", self._properties)
        except Exception as error:
            self._fail("cannot compile", sizes, error)
        if plan is None and kept and self._plans.usable and self._bundle.data_is_as_stated(self.graph):
            self._plans.store(key, self._checked_plan(compiled, sizes))
        return compiled

    def _checked_plan(self, compiled: Any, sizes: Shapes) -> bytes:
        """The compiled graph as bytes if it computes the same after reading it back, otherwise nothing.

        The check is needed: OpenVINO 2026.4 loses settings of its rotary embedding on the way and then computes
        something else, without a word. An empty entry says that it was tried.
        """
        try:
            plan: bytes = compiled.export_model().getvalue()
            again = _core().import_model(plan, "CPU", self._properties)
            rng = np.random.default_rng(0)
            inputs = {
                name: rng.normal(size=shape).astype(spec.dtype)
                if np.dtype(spec.dtype).kind == "f"
                else rng.integers(0, 2, shape).astype(spec.dtype)
                for (name, spec), shape in zip(self.inputs.items(), sizes, strict=True)
            }
            same = _digests(compiled, inputs) == _digests(again, inputs)
        except Exception:
            return b""
        return plan if same else b""

    def _fail(self, what: str, sizes: Shapes, error: Exception) -> NoReturn:
        shapes_text = ", ".join(f"{name} {list(shape)}" for name, shape in zip(self.inputs, sizes, strict=True))
        raise EngineError(
            f"OpenVINO {what} graph {self.graph} for {quote(shapes_text, 300)[1:-1]}: {one_line(error)}"
        ) from error


class _BoundStep:
    """Holds what a bound run needs. OpenVINO has only the addresses of the buffers, so they are kept alive here."""

    __slots__ = ("__weakref__", "_buffers", "_graph", "_request", "_run", "_stopped")

    def __init__(self, graph: str, request: Any, buffers: object) -> None:
        self._graph, self._run, self._request, self._buffers = graph, request.infer, request, buffers
        self._stopped = False

    def __call__(self) -> None:
        thread = get_ident()
        self._stopped = False
        RUNNING[thread] = self
        try:
            self._run(share_outputs=True)  # otherwise every output is copied into its return value
        except Exception as error:
            self._fail(error)
        finally:
            RUNNING.pop(thread, None)

    def stop(self) -> None:
        """Ends a run that another thread is in, after the node that it is at."""
        self._stopped = True
        self._request.cancel()

    def _fail(self, error: Exception) -> NoReturn:
        if self._run is None:
            raise EngineError(f"The engine of graph {self._graph} was closed: load the graph again.") from None
        if self._stopped:
            raise EngineError(f"Graph {self._graph} was stopped.") from None
        raise EngineError(f"OpenVINO failed in graph {self._graph}: {one_line(error)}") from error

    def release(self) -> None:
        self._run = self._request = self._buffers = None


def _writable(array: np.ndarray) -> np.ndarray:
    """The same memory under a writable array: OpenVINO takes no other, and writes to outputs only."""
    if array.flags.writeable:
        return array
    memory = (ctypes.c_byte * array.nbytes).from_address(array.ctypes.data)
    return np.frombuffer(memoryview(memory), array.dtype).reshape(array.shape)


def _digests(compiled: Any, inputs: Mapping[str, np.ndarray]) -> list[bytes]:
    """Hashes of a run's outputs. Calling `compiled` would keep a request in it, with buffers for all of a decoder's
    caches, for as long as it lives."""
    results = compiled.create_infer_request().infer(inputs, share_inputs=True, share_outputs=True)
    return [sha256(np.ascontiguousarray(value).data).digest() for value in results.values()]


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _read_model(openvino: Any, bundle: Bundle, graph: str) -> tuple[Any, tuple[Range, ...]]:
    """The graph with symbolic shapes, and where its weights are: in the bundle's data file, which OpenVINO maps.

    OpenVINO finds a data file only beside a graph that it reads itself. So that it reads the bytes that were checked,
    whatever happens to the bundle meanwhile, they lie in a folder of our own beside a second name of the data file.
    """
    path, info = bundle.graph_path(graph), bundle.graph_info(graph)
    content, data = bundle.read_graph(graph), bundle.data_path(graph)
    parse_graph(content, str(path))
    temporary = Path(gettempdir())
    try:
        # A second name must be in the same file system as the first.
        for place in (temporary,) if data is None else (temporary, data.parent):
            unfinished.sweep(place)
            with suppress(OSError), _folder_in(place) as folder:
                (folder / info.file).write_bytes(content)
                if data is not None:
                    os.link(data, folder / str(info.data))
                model = _core().read_model(utf8_name(folder / info.file))
                # Under a name of our own, the mapping is this model's and nobody else's.
                return model, mapped_ranges(Path(os.path.realpath(folder)) / str(info.data))
        if data is not None and (bundle.folder / str(info.data)).is_symlink():
            raise EngineError(
                f"OpenVINO needs the weights {data} under a second name, which neither {temporary} nor their own "
                "folder takes: copy the bundle with its links followed (cp -rL), or use the engine onnxruntime."
            )
        found = _core().read_model(utf8_name(path))
        bundle.read_graph(graph)  # raises if it is not the same any more
        return found, ()
    except (BundleError, EngineError):
        raise
    except Exception as error:
        version = openvino.__version__.partition("-")[0]
        raise EngineError(f"OpenVINO {version} cannot load {path}: {one_line(error)}") from error


@contextmanager
def _folder_in(place: Path) -> Iterator[Path]:
    """A folder that nobody else can write, for as long as the block runs."""
    folder = unfinished.begin(place, is_folder=True, mode=0o700)
    try:
        yield folder
    finally:
        unfinished.discard(folder)


def _base_key(openvino: Any, hashes: list[str], properties: dict[str, str]) -> dict[str, str]:
    """Everything but the shapes that a compiled graph depends on."""
    return {
        "engine": f"openvino {openvino.__version__}",
        "graph": " ".join(hashes),
        "properties": str(sorted(properties.items())),
        **cpu_key(),
    }
