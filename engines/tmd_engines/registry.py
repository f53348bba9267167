"""Which engines there are, and which of them runs a graph. Nothing of an engine is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from .bundle.reader import Bundle
from .device.cpu import describe_cpu
from .device.gpu import has_onnxruntime_cuda, has_tensorrt, split_device
from .engine import Engine, Progress
from .errors import EngineError, quote

# engine -> device -> (module, class)
_IMPLEMENTATIONS: dict[str, dict[str, tuple[str, str]]] = {
    "onnxruntime": {
        "cpu": ("onnxruntime.engine", "OnnxRuntimeEngine"),
        "cuda": ("onnxruntime.gpu_engine", "OnnxRuntimeDeviceEngine"),
    },
    "openvino": {"cpu": ("openvino.engine", "OpenVinoEngine")},
    "tensorrt": {"cuda": ("tensorrt.engine", "TensorRtEngine")},
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
