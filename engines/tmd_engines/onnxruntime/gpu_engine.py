"""ONNX Runtime on a CUDA device: buffers are OrtValues there, and nothing is copied between the runs of a loop.

A session is opened for the sizes that it is bound to, so that the shape arithmetic of the graph folds away and every
node can run on the GPU, which is what ONNX Runtime asks for before it records a CUDA graph. float16 and bfloat16 are
computed as the graph says. With `device` "cpu" the same code runs on the CPU's memory and provider: that is for tests,
and the only way in which it has ever run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from ..bundle.graph_file import name_data, parse_graph
from ..bundle.reader import Bundle
from ..device.array import DeviceArray
from ..device.engine import DeviceEngine, Shapes
from ..device.gpu import has_onnxruntime_cuda, split_device
from ..engine import Progress
from ..errors import EngineError, one_line
from . import SILENT
from .lowering import attention_to_multi_head_attention, low_precision_to_float32

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_INSTALL = "Install it, and only it (pip uninstall onnxruntime): pip install 'onnxruntime-gpu[cuda,cudnn]'"


def import_onnxruntime(device: str) -> Any:
    """The library, if it has the provider of `device`. Raises EngineError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(f"The engine onnxruntime cannot be imported ({error}). {_INSTALL}") from None
    kind, _ = split_device(device)
    if _PROVIDERS[kind] not in onnxruntime.get_available_providers():
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} is here in a build without {kind}. {_INSTALL}")
    if kind == "cuda":
        onnxruntime.preload_dlls()  # from the nvidia-* wheels, where these are installed
    return onnxruntime


class OrtArray(DeviceArray):
    """A buffer that ONNX Runtime allocated on a device."""

    def __init__(self, device: str, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(shape, dtype)
        self._device = device
        value = import_onnxruntime(device).OrtValue
        try:
            self.value = value.ortvalue_from_shape_and_type(shape, self.dtype.type, *split_device(device))
        except Exception as error:
            raise EngineError(f"ONNX Runtime has no {self.nbytes} bytes on {device}: {one_line(error)}") from error

    @property
    def address(self) -> int:
        return int(self.value.data_ptr())

    def write(self, values: np.ndarray) -> None:
        """See `DeviceArray.write`."""
        self.value.update_inplace(values)

    def read(self) -> np.ndarray:
        """See `DeviceArray.read`."""
        return np.array(self.value.numpy())  # on the CPU `numpy` is a view

    def copy_from(self, other: DeviceArray) -> None:
        """See `DeviceArray.copy_from`."""
        _copier(self._device)(other, self)


class _Copier:
    """Copies one array of a device to another: a graph of one node, as OrtValues have no such copy in Python."""

    def __init__(self, device: str) -> None:
        self._place = split_device(device)
        self._session = _open(import_onnxruntime(device), device, _copy_graph(), {})

    def __call__(self, source: DeviceArray, target: DeviceArray) -> None:
        binding = self._session.io_binding()
        binding.bind_input("source", *self._place, np.uint8, (source.nbytes,), source.address)
        binding.bind_output("target", *self._place, np.uint8, (target.nbytes,), target.address)
        self._session.run_with_iobinding(binding)


@cache
def _copier(device: str) -> _Copier:
    return _Copier(device)


def _copy_graph() -> bytes:
    """An ONNX graph that gives the bytes it gets."""
    from onnx import TensorProto, helper

    source, target = (
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["bytes"]) for name in ("source", "target")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["source"], ["target"])], "copy", [source], [target])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    content: bytes = model.SerializeToString()
    return content


class OnnxRuntimeDeviceEngine(DeviceEngine):
    """One graph, opened once per combination of input shapes. Buffers are `OrtArray`s."""

    precisions = ("fp32", "fp16", "bf16")
    package, install = "onnxruntime", "pip install 'onnxruntime-gpu[cuda,cudnn]'"

    @classmethod
    def is_here(cls) -> bool:
        """A GPU, and ONNX Runtime in its build for it."""
        return has_onnxruntime_cuda()

    def __init__(
        self, bundle: Bundle, graph: str, device: str, threads: int | None, progress: Progress | None = None
    ) -> None:
        super().__init__("onnxruntime", graph, bundle.graph_info(graph))
        self._device, self._place = device, split_device(device)
        self._onnxruntime = import_onnxruntime(device)
        path = bundle.graph_path(graph)
        model = parse_graph(bundle.read_graph(graph), str(path))
        if device == "cpu":
            low_precision_to_float32(model)
        attention_to_multi_head_attention(model)
        folder = name_data(model, bundle.data_path(graph), bundle.folder)
        self._model, self._path = model.SerializeToString(), path
        self._settings = {"folder": str(folder), "threads": threads}

    def array(self, shape: tuple[int, ...], dtype: str) -> OrtArray:
        """See `DeviceEngine.array`."""
        return OrtArray(self._device, shape, dtype)

    def _compile(self, shapes: Shapes) -> _Session:
        sizes: dict[str, int] = {}
        for spec, shape in zip(self.inputs.values(), shapes, strict=True):
            for size, (factor, symbol) in zip(shape, spec.factors(), strict=True):
                if symbol is not None and factor == 1:
                    sizes[symbol] = size
        problem: Exception | None = None
        for records in (True, False) if self._place[0] == "cuda" else (False,):
            try:
                settings = {**self._settings, "sizes": sizes}
                return _Session(_open(self._onnxruntime, self._device, self._model, settings, records), records)
            except Exception as error:  # recording is refused where a node must run on the CPU
                problem = error
        raise EngineError(
            f"ONNX Runtime {self._onnxruntime.__version__} cannot load {self._path} on {self._device}: "
            f"{one_line(problem) if problem else ''}"
        ) from problem

    def _runner(
        self, compiled: _Session, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> Callable[[], None]:
        binding = compiled.session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, *self._place, array.dtype.type, array.shape, array.address)
        for name, array in outputs.items():
            binding.bind_output(name, *self._place, array.dtype.type, array.shape, array.address)
        options = self._onnxruntime.RunOptions()
        if compiled.records:  # each binding is a CUDA graph of its own
            options.add_run_config_entry("gpu_graph_id", str(next(compiled.numbers)))
        return partial(compiled.session.run_with_iobinding, binding, options)


class _Session:
    """A session, whether it records CUDA graphs, and the numbers of those to come."""

    def __init__(self, session: Any, records: bool) -> None:
        self.session, self.records, self.numbers = session, records, itertools.count(1)


def _open(onnxruntime: Any, device: str, model: bytes, settings: dict[str, Any], records: bool = False) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SILENT
    options.intra_op_num_threads = settings.get("threads") or 0
    for symbol, size in settings.get("sizes", {}).items():
        options.add_free_dimension_override_by_name(symbol, size)
    if "folder" in settings:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", settings["folder"])
    kind, number = split_device(device)
    given = {"enable_cuda_graph": "1"} if records else {}
    if kind == "cuda":
        given |= {"device_id": str(number), "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
    providers = [(_PROVIDERS[kind], given)]
    if kind != "cpu":
        providers.append((_PROVIDERS["cpu"], {}))
    return onnxruntime.InferenceSession(model, options, providers=providers)
