"""Which engines there are, and which of them runs a graph. An engine's module is imported when it is asked for.

What an engine can do stands in its class (`Engine`): a new one is a room of its own, and a line in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .device.gpu import has_gpu, split_device
from .errors import EngineError, quote

if TYPE_CHECKING:
    from .bundle.reader import Bundle
    from .engine import Engine, Progress

ENGINES: dict[str, dict[str, str | type[Engine]]] = {
    "tensorrt-rtx": {"cuda": "tensorrt.engine:TensorRtForRtxEngine"},
    "tensorrt": {"cuda": "tensorrt.engine:TensorRtEngine"},
    "openvino": {"cpu": "openvino.engine:OpenVinoEngine"},
    "onnxruntime": {
        "cpu": "onnxruntime.engine:OnnxRuntimeEngine",
        "cuda": "onnxruntime.gpu_engine:OnnxRuntimeDeviceEngine",
    },
}
"""Engine -> kind of device -> its class, or where in this package that is. "auto" asks them in this order."""

DEVICE_NAMES = ("auto", "cpu", "cuda")  # and "cuda:N"


def engine_names() -> tuple[str, ...]:
    """What `engine` may be."""
    return ("auto", *sorted(ENGINES))


def engine_class(engine: str, kind: str) -> type[Engine]:
    """The class of an engine on this kind of device."""
    found = ENGINES[engine][kind]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        loaded: type[Engine] = getattr(import_module(f".{module}", __package__), name)
        return loaded
    return found


def load(
    bundle: Bundle,
    graph: str,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    plans: str | Path | None = None,
) -> Engine:
    """Makes a graph of a bundle executable.

    `engine` is one of `engine_names`, `device` one of `DEVICE_NAMES` or "cuda:N", which is GPU N of those that
    CUDA_VISIBLE_DEVICES leaves, from 0 on; "auto" is decided by `choose`. `threads` is the number of CPU threads of one
    run, None for as many as there are physical cores. `progress` is called while an engine compiles, which TensorRT
    does for minutes, when buffers are bound. `plans` is a folder of plans made ahead of time, for an engine that takes
    such: code that runs on the GPU, so name only a folder that you trust.
    Raises EngineError if the graph, the engine or the device is not to be had (and says what to do), BundleError if the
    file changed since the bundle was opened.
    """
    engine, device = choose(bundle, graph, engine, device)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise EngineError(f"threads is {quote(threads)}: give a whole number from 1 to 1024, or None for all cores.")
    opened = engine_class(engine, split_device(device)[0]).open(bundle, graph, device, threads, progress)
    if plans is not None:
        opened.use_plans(plans)
    return opened


def check_engine(engine: str, device: str = "auto") -> None:
    """Raises EngineError unless `engine` and `device` are names that go together."""
    kind, _ = split_device(device)
    if engine != "auto" and engine not in ENGINES:
        raise EngineError(f"There is no engine {quote(engine)}. Choose one of: {', '.join(engine_names())}.")
    if kind not in DEVICE_NAMES:
        raise EngineError(
            f"There is no device {quote(device)}. Choose one of: {', '.join(DEVICE_NAMES)}, cuda:N (N from 0)."
        )
    if engine != "auto" and kind != "auto" and kind not in ENGINES[engine]:
        raise EngineError(
            f"The engine {engine} runs on device {' or '.join(ENGINES[engine])}, not on {device}: choose "
            "another engine or device, or leave one of them to auto."
        )


def choose(bundle: Bundle, graph: str, engine: str = "auto", device: str = "auto") -> tuple[str, str]:
    """Engine and device for a graph, where "auto" leaves them open. A number of the device is kept.

    The first engine of `ENGINES` that is here, takes the graph and is fast with it (`Engine.prefers`); with an NVIDIA
    GPU, one on the GPU. ONNX Runtime asked for by name stays on the CPU unless the device is asked for as well.
    Raises EngineError, and BundleError if the bundle has no such graph.
    """
    check_engine(engine, device)
    kind, _ = split_device(device)
    if engine != "auto":
        return engine, next(iter(ENGINES[engine])) if device == "auto" else device
    info = bundle.graph_info(graph)
    size = sum(bundle.manifest.files[name].size for name in (info.file, info.data) if name)
    kinds = ("cuda", "cpu") if has_gpu() else ("cpu",)  # without a GPU its engines need not be imported to be asked
    for where in kinds if kind == "auto" else (kind,):
        for name, found in _on(where):
            if found.is_here() and found.prefers(info, size):
                return name, where if device == "auto" else device
    what = "the graph" if device == "auto" else f"device {device}"
    remedy = "" if device == "auto" else " Without a GPU, leave the device to auto."
    raise EngineError(f"There is no engine for {what} here: tmd-engine doctor says what is missing.{remedy}")


def _on(kind: str) -> Iterator[tuple[str, type[Engine]]]:
    return ((name, engine_class(name, kind)) for name, devices in ENGINES.items() if kind in devices)
