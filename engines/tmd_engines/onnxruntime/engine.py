"""ONNX Runtime on the CPU: the engine that runs anywhere, and the one the others are compared with."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from threading import get_ident
from typing import Any, NoReturn

import numpy as np

from ..bundle.graph_file import data_folder, name_data, parse_graph
from ..bundle.reader import Bundle
from ..device.buffers import check_buffers, check_cpu_graph, empty_array
from ..device.cpu import describe_cpu
from ..device.gpu import has_gpu, has_onnxruntime_cuda
from ..device.paths import utf8_name
from ..device.running import RUNNING
from ..engine import Engine
from ..errors import BundleError, EngineError, one_line
from ..holding import WIDENED_BYTES
from . import SILENT
from .float4 import float4_to_float8
from .kept import KeptGraph
from .lowering import (
    attention_to_multi_head_attention,
    lean_order,
    low_precision_to_float32,
    signed_to_unsigned_activations,
    widens_in_products,
)

_LITERAL = ("fp8", "nvfp4")  # computed in float32 on rounded values
_FOR_GPU = "pip uninstall onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


class OnnxRuntimeEngine(Engine):
    """One ONNX Runtime session. Buffers are C-contiguous numpy arrays; nothing is copied in or out.

    Graphs in 16 bits run in float32. Their large weights stay mapped as they are, and are widened for each product.
    Those in fp8 and nvfp4 run in float32 too, on values that are rounded as the graph says: to see what a GPU computes,
    not to be fast. int8 products are int8 here too.
    """

    shares = opens_beside = True
    package, install = "onnxruntime", "pip install onnxruntime"

    @classmethod
    def note(cls) -> str | None:
        """Whether it has the GPU, where there is one."""
        if not has_gpu():
            return None
        return "on the CPU and the GPU" if has_onnxruntime_cuda() else f"on the CPU only, for the GPU: {_FOR_GPU}"

    def __init__(
        self, bundle: Bundle, graph: str, device: str, threads: int | None, *, as_stored: bool = False
    ) -> None:
        """`as_stored` is for comparing, not for speed: values are rounded where the graph has low precision, and
        weights are read from the file each time they are used instead of being copied and packed."""
        info = bundle.graph_info(graph)
        super().__init__(graph, info.inputs, info.outputs)
        check_cpu_graph("onnxruntime", device, graph, info, self.precisions)
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(
                f"The engine onnxruntime cannot be imported ({error}). Install it: pip install onnxruntime"
            ) from None
        self._kept = None if as_stored else KeptGraph(onnxruntime, bundle, self, threads)
        self._session = _open_session(onnxruntime, bundle, graph, threads, self._kept)
        self._options = onnxruntime.RunOptions
        self._steps: weakref.WeakSet[_BoundStep] = weakref.WeakSet()

    def empty(self, name: str, **dims: int) -> np.ndarray:
        """Uninitialised C-contiguous array for the input or output `name`. Raises EngineError."""
        return empty_array(self, name, dims)

    def bind(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> _BoundStep:
        """See `Engine.bind`. Sizes that only the graph can relate (tokens to height) are errors of the step."""
        session = self._session  # whoever closes this engine meanwhile
        if session is None:
            raise EngineError(f"The engine of graph {self.graph} is closed: load the graph again.")
        check_buffers(self, inputs, outputs)
        if self._kept is not None:
            self._kept.check(session, {name: array.shape for name, array in inputs.items()})
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in outputs.items():
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        buffers = dict(inputs), dict(outputs)
        options = self._options()
        options.log_severity_level = SILENT
        step = _BoundStep(self.graph, session, binding, options, buffers)
        self._steps.add(step)
        return step

    def close(self) -> None:
        """See `Engine.close`."""
        for step in self._steps:
            step.release()
        self._steps.clear()
        self._session = None


def fast_unsigned_products() -> bool:
    """Whether the CPU sums products of uint8 and int8 exactly (VNNI). Without, pairs of them saturate at 16 bits."""
    return any(feature in ("avx512_vnni", "avx_vnni", "amx_int8") for feature in describe_cpu()["features"] or ())


class _BoundStep:
    """Holds what a bound run needs. ONNX Runtime has only the addresses of the buffers, so they are kept alive here."""

    __slots__ = ("__weakref__", "_binding", "_buffers", "_graph", "_options", "_run")

    def __init__(self, graph: str, session: Any, binding: Any, options: Any, buffers: object) -> None:
        self._graph, self._options, self._buffers = graph, options, buffers
        try:
            # With options, the public function spends 55 microseconds to see whether they are for WebGPU.
            self._run, self._binding = session._sess.run_with_iobinding, binding._iobinding
        except AttributeError:  # another version
            self._run, self._binding = session.run_with_iobinding, binding

    def __call__(self) -> None:
        thread = get_ident()
        self._options.terminate = False
        RUNNING[thread] = self
        try:
            self._run(self._binding, self._options)
        except Exception as error:
            self._fail(error)
        finally:
            RUNNING.pop(thread, None)

    def stop(self) -> None:
        """Ends a run that another thread is in, after the node that it is at."""
        self._options.terminate = True

    def release(self) -> None:
        self._run = self._binding = self._buffers = None

    def _fail(self, error: Exception) -> NoReturn:
        if self._run is None:
            raise EngineError(f"The engine of graph {self._graph} was closed: load the graph again.") from None
        if self._options.terminate:
            raise EngineError(f"Graph {self._graph} was stopped.") from None
        raise EngineError(f"ONNX Runtime failed in graph {self._graph}: {one_line(error)}") from error


def _open_session(onnxruntime: Any, bundle: Bundle, graph: str, threads: int | None, kept: KeptGraph | None) -> Any:
    """The lowered graph as a session. Its weights stay in the bundle's data file, which ONNX Runtime maps, unless
    `kept` has them. Without `kept` the graph is computed as it is stored."""
    path = bundle.graph_path(graph)
    stored = bundle.read_graph(graph)
    literal = kept is None or bundle.graph_info(graph).precision in _LITERAL

    widens = False

    def lowered() -> bytes:
        nonlocal widens
        model = parse_graph(stored, str(path))
        float4_to_float8(model, str(path))
        low_precision_to_float32(model, rounding=kept is None, where=str(path))
        attention_to_multi_head_attention(model)
        if not literal and fast_unsigned_products():
            signed_to_unsigned_activations(model)
        lean_order(model)
        widens = not literal and widens_in_products(model)
        name_data(model, bundle.data_path(graph), bundle.folder)
        return model.SerializeToString()

    def options() -> Any:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = SILENT
        settings.intra_op_num_threads = threads or 0
        folder = utf8_name(data_folder(bundle.data_path(graph), bundle.folder))
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        # The graphs of a bundle run in turn: idle threads of one must not take the cores from the next.
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        settings.enable_mem_pattern = False  # memory planned ahead lets tensors of the VAE live longer than needed
        # The search for a buffer to use again grows with the square of the nodes where sizes are open, takes longer
        # than all else of loading, and finds what the arena finds anyway (docs/speed.md).
        settings.enable_mem_reuse = False
        if widens:
            settings.add_session_config_entry(
                "optimization.constant_folding_max_output_size_in_bytes", str(WIDENED_BYTES)
            )
            # It widens weights in float16 for good.
            settings.add_session_config_entry(
                "optimization.disable_specified_optimizers", "FuseFp16InitializerToFp32NodeTransformer"
            )
        if literal:  # the fusion of Q/DQ with products takes every type for int8, and skips roundings
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        if kept is None:
            settings.add_session_config_entry("session.disable_prepacking", "1")
            settings.enable_cpu_mem_arena = False
        return settings

    try:
        if kept is not None:
            return kept.open(lowered, options)
        return onnxruntime.InferenceSession(
            lowered(), options(), providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    except BundleError:
        raise
    except Exception as error:
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {one_line(error)}") from error
