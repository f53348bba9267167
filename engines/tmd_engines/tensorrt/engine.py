"""TensorRT 10 and 11 on an NVIDIA GPU: a graph is lowered, checked and built for the sizes that it is bound to.

Plans are kept in a cache of this user; docs/engines.md says what their key holds. None of this has ever run on a GPU.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..bundle.graph_file import parse_graph
from ..bundle.reader import Bundle, format_size
from ..device.array import DeviceArray
from ..device.engine import DeviceEngine, Shapes
from ..device.gpu import has_cuda_bindings, has_gpu, split_device
from ..device.plan_cache import PlanCache, cache_folder
from ..engine import Progress, Step
from ..errors import EngineError, quote
from .lint import check_graph
from .lowering import lower, mark_decomposable
from .progress import BuildProgress

if TYPE_CHECKING:
    import onnx

    from ..device.cuda import CudaArray
    from .build import BuildSettings, Plan

WORKSPACE = "TMD_TENSORRT_WORKSPACE"  # MiB; read whenever a plan is looked for, because it is part of its key
_MAX_ENTRY, _MAX_FOLDER = 32 << 30, 64 << 30
_STREAM_ABOVE = 0.8  # of the device's memory: weights that take more stay on the host and are streamed
_FP8_SINCE = (8, 9)


def import_tensorrt() -> tuple[Any, Any]:
    """Our modules over TensorRT and CUDA. Raises EngineError saying which library is missing."""
    try:
        from . import build as tensorrt_build
    except (ImportError, OSError) as error:
        raise EngineError(
            f"The engine tensorrt cannot be imported ({error}). Install it, on a machine with an NVIDIA GPU: "
            "pip install tensorrt; on a Jetson it comes with JetPack."
        ) from None
    try:
        from ..device import cuda
    except (ImportError, OSError) as error:
        raise EngineError(
            f"TensorRT is here, and the CUDA bindings for Python are not ({error}): pip install cuda-python"
        ) from None
    return tensorrt_build, cuda


class TensorRtEngine(DeviceEngine):
    """One graph, built once per combination of input shapes. Buffers are `CudaArray`s."""

    records = True
    storages = (None, "fp32", "fp16")  # blocks of int8 are nothing that TensorRT reads
    package, install = "tensorrt", "pip install tensorrt cuda-python (needs an NVIDIA GPU and driver)"

    @classmethod
    def is_here(cls) -> bool:
        """A GPU, TensorRT and the CUDA bindings for Python."""
        return has_gpu() and super().is_here() and has_cuda_bindings()

    @classmethod
    def note(cls) -> str | None:
        """What it lacks to run here, and the command that mends it."""
        if not has_gpu():
            return "but no NVIDIA GPU is seen: install its driver"
        return None if has_cuda_bindings() else "but not the CUDA bindings for Python: pip install cuda-python"

    @classmethod
    def check(cls, bundle: Bundle, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether the parser of the TensorRT that is here takes the graph. Raises EngineError."""
        super().check(bundle, graph, shapes)
        path = bundle.graph_path(graph)
        model = parse_graph(bundle.read_graph(graph), str(path))
        lowered_graph(model, shapes, import_tensorrt()[0].version(), str(path), bundle.folder)

    def __init__(
        self, bundle: Bundle, graph: str, device: str, threads: int | None, progress: Progress | None = None
    ) -> None:
        info = bundle.graph_info(graph)
        super().__init__("tensorrt", graph, info)
        self._build, self._cuda = import_tensorrt()
        self._cuda.use(split_device(device)[1])
        self._device = self._cuda.device()
        self._info, self._progress = info, progress
        self._path = bundle.graph_path(graph)
        if info.precision == "fp8" and self._device.capability < _FP8_SINCE:
            raise EngineError(
                f"Graph {graph} is fp8, which GPUs multiply from compute capability 8.9 on, and {self._device.name} "
                f"has {_dotted(self._device.capability)}: use a bundle in fp16 or bf16."
            )
        self._model = parse_graph(bundle.read_graph(graph), str(self._path))
        self._model.DiscardUnknownFields()  # what our checks could not see, TensorRT shall not see either
        files = bundle.manifest.files
        self._hashes = " ".join(files[name].sha256 for name in (info.file, info.data) if name)
        self._weights = {each: _weight_bytes(bundle, each) for each in bundle.manifest.graphs}
        self._title = f"{bundle.manifest.model.name} {graph}"

    def array(self, shape: tuple[int, ...], dtype: str) -> CudaArray:
        """See `DeviceEngine.array`."""
        made: CudaArray = self._cuda.CudaArray(shape, dtype)
        return made

    def record(self, work: Callable[[], None]) -> Step:
        """See `Engine.record`: a CUDA graph."""
        recorded: Step = self._cuda.stream().record(work)
        return recorded

    def settings(self) -> BuildSettings:
        """How graphs of this bundle are built on this device. Raises EngineError for a workspace that is no number."""
        streaming = sum(self._weights.values()) > _STREAM_ABOVE * self._device.memory
        made: BuildSettings = self._build.BuildSettings(workspace_limit(), streaming)
        return made

    def lowered(self, shapes: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto:
        """The graph as TensorRT gets it, checked. Raises EngineError if TensorRT would refuse it."""
        return lowered_graph(self._model, shapes, self._build.version(), str(self._path), self._path.parent)

    def _compile(self, shapes: Shapes) -> Plan:
        named = dict(zip(self.inputs, shapes, strict=True))
        model = self.lowered(named)
        settings = self.settings()
        content = model.SerializeToString(deterministic=True)
        key = plan_key(
            self._title,
            self._hashes,
            content,
            self._build.full_version(),
            self._device,
            self._info.precision,
            named,
            settings,
        )
        told = BuildProgress(self.graph, self._progress)
        try:
            return _cached_plan(self._build, key, content, str(self._path), named, settings, told)
        except EngineError:
            if told.stopped is not None or not mark_decomposable(model, None):
                raise
        told.say("no fused kernel for an attention of this graph: building again, with attention taken apart")
        content = model.SerializeToString(deterministic=True)
        key = {**key, "lowered": hashlib.sha256(content).hexdigest()}
        return _cached_plan(self._build, key, content, str(self._path), named, settings, told)

    def _runner(
        self, compiled: Plan, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> Callable[[], None]:
        addresses = {name: array.address for name, array in (*inputs.items(), *outputs.items())}

        def run() -> None:
            stream = self._cuda.stream()
            compiled.enqueue(addresses, stream.handle)
            stream.wait()

        return run


def lowered_graph(
    model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], version: tuple[int, int], where: str, folder: Any
) -> onnx.ModelProto:
    """A copy of `model` for TensorRT `version`, checked against what its parser takes. Raises EngineError."""
    lowered: onnx.ModelProto = type(model)()
    lowered.CopyFrom(model)
    lower(lowered, version, shapes)
    check_graph(lowered, shapes, version, where, folder)
    mark_decomposable(lowered, shapes)
    return lowered


def plan_key(
    title: str,
    hashes: str,
    model: bytes,
    version: str,
    device: Any,
    precision: str,
    shapes: Mapping[str, tuple[int, ...]],
    settings: BuildSettings,
) -> dict[str, str]:
    """Everything that a plan depends on. `hashes` are those of graph and weights, `model` is the lowered graph."""
    return {
        "title": title,
        "graph": hashes,
        "lowered": hashlib.sha256(model).hexdigest(),
        "engine": f"tensorrt {version}",
        "device": device.name,
        "compute capability": _dotted(device.capability),
        "precision": precision,
        "shapes": ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())),
        "flags": settings.flags(),
    }


def workspace_limit() -> int | None:
    """Bytes that TensorRT may use beside weights and buffers, from the environment; None: what there is."""
    wanted = os.environ.get(WORKSPACE, "")
    if not wanted:
        return None
    if not (wanted.isascii() and wanted.isdigit() and 0 < int(wanted) <= 1 << 24):
        raise EngineError(f"{WORKSPACE} is {quote(wanted)}: give a whole number of MiB, or unset it for no limit.")
    return int(wanted) << 20


def _cached_plan(
    library: Any,
    key: dict[str, str],
    content: bytes,
    path: str,
    shapes: Mapping[str, tuple[int, ...]],
    settings: BuildSettings,
    told: BuildProgress,
) -> Plan:
    """The plan from the cache or, where that has none that counts, built and put there. Raises EngineError."""
    folder = cache_folder()
    plans = PlanCache(None if folder is None else folder / "tensorrt", _MAX_ENTRY, _MAX_FOLDER)
    with plans.locked(key):
        stored = plans.load(key)
        if stored is not None:
            try:
                plan: Plan = library.Plan(stored, shapes)
                return plan
            except EngineError as error:
                told.say(f"the plan in the cache does not load, and is built anew: {error}")
        else:
            for difference in plans.differences(key, ("title", "shapes"))[:2]:
                told.say(f"the plan in the cache is for something else ({difference}): building anew")
        timing_key = {name: key[name] for name in ("engine", "device", "compute capability")} | {"kind": "timing cache"}
        built, timing = library.build(content, path, shapes, settings, plans.load(timing_key), told)
        plans.store(timing_key, timing)
        plans.store(key, built)
        told.say(f"built, {format_size(len(built))}" + ("" if plans.usable else ", and not kept: the cache is off"))
    plan = library.Plan(built, shapes)
    return plan


def _weight_bytes(bundle: Bundle, graph: str) -> int:
    info = bundle.graph_info(graph)
    return sum(bundle.manifest.files[name].size for name in (info.file, info.data) if name)


def _dotted(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))
