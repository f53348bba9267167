"""Memory, stream and graphs of a CUDA device, through NVIDIA's bindings for Python (package cuda-bindings).

One GPU and one stream for the whole process: everything runs in the order in which it was asked for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import runtime as cudart

from ..errors import EngineError
from .array import DeviceArray


def check(answer: tuple[Any, ...]) -> Any:
    """What a CUDA function returned beside its error code: nothing, one value, or several. Raises EngineError."""
    error, *values = answer
    if error != cudart.cudaError_t.cudaSuccess:
        reason = cudart.cudaGetErrorString(error)[1]
        text = reason.decode() if isinstance(reason, bytes) else str(reason)
        raise EngineError(f"CUDA failed: {text} ({error.name}). tmd-engine doctor shows GPU and driver.")
    return values[0] if len(values) == 1 else tuple(values)


class Device(NamedTuple):
    """The GPU in use: name, compute capability such as (8, 7), and memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int


_used: int | None = None  # the number of the GPU of this process, once there is one
_current = threading.local()  # CUDA keeps a current GPU for each thread


def use(number: int) -> None:
    """Makes a GPU, as CUDA_VISIBLE_DEVICES orders them, that of this process. Raises EngineError."""
    global _used
    if _used not in (None, number):
        raise EngineError(
            f"This process uses cuda:{_used}, and one process uses one GPU: start another one for cuda:{number}."
        )
    count = check(cudart.cudaGetDeviceCount())
    if number >= count:
        raise EngineError(
            f"There is no cuda:{number} here, only {', '.join(f'cuda:{known}' for known in range(count))}: "
            "tmd-engine doctor shows them, and CUDA_VISIBLE_DEVICES hides some."
        )
    _used = number


@cache
def device() -> Device:
    """The GPU of this process. Raises EngineError without a GPU or driver."""
    properties = check(cudart.cudaGetDeviceProperties(_used or 0))
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Device(name.rstrip("\0"), (int(properties.major), int(properties.minor)), int(properties.totalGlobalMem))


def capability_of(number: int) -> tuple[int, int]:
    """Compute capability of a GPU, which is not taken into use. Raises EngineError without a GPU or driver."""
    properties = check(cudart.cudaGetDeviceProperties(number))
    return int(properties.major), int(properties.minor)


class Stream:
    """The stream of this process. While it records, nothing runs."""

    def __init__(self) -> None:
        self._stream = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self.handle = int(self._stream)
        self.recording = False

    def wait(self) -> None:
        """Returns when all that was asked for is done; at once while recording."""
        if not self.recording:
            check(cudart.cudaStreamSynchronize(self._stream))

    def copy(self, target: int, source: int, size: int, kind: Any) -> None:
        check(cudart.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as a CUDA graph. Calling it returns when the graph has run. Raises EngineError."""
        check(
            cudart.cudaStreamBeginCapture(self._stream, cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        )
        self.recording = True
        try:
            work()
        finally:
            self.recording = False
            graph = check(cudart.cudaStreamEndCapture(self._stream))
        try:
            return _Recording(self, check(cudart.cudaGraphInstantiate(graph, 0)))
        finally:
            check(cudart.cudaGraphDestroy(graph))

    def launch(self, recording: Any) -> None:
        check(cudart.cudaGraphLaunch(recording, self._stream))


class _Recording:
    def __init__(self, stream: Stream, executable: Any) -> None:
        self._stream, self._executable = stream, executable
        weakref.finalize(self, cudart.cudaGraphExecDestroy, executable)

    def __call__(self) -> None:
        self._stream.launch(self._executable)
        self._stream.wait()


def stream() -> Stream:
    """The stream of this process; makes its GPU the current one of this thread. Raises EngineError without a GPU."""
    if not getattr(_current, "set", False):
        check(cudart.cudaSetDevice(_used or 0))
        _current.set = True
    return _stream()


@cache
def _stream() -> Stream:
    return Stream()


class CudaArray(DeviceArray):
    """A buffer in the memory of the GPU."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        super().__init__(shape, dtype)
        self._stream = stream()
        self._address = int(check(cudart.cudaMalloc(max(1, self.nbytes))))
        weakref.finalize(self, cudart.cudaFree, self._address)

    @property
    def address(self) -> int:
        return self._address

    def write(self, values: np.ndarray) -> None:
        """See `DeviceArray.write`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._stream.copy(self._address, values.ctypes.data, self.nbytes, kind)
        self._stream.wait()  # `values` may go away

    def read(self) -> np.ndarray:
        """See `DeviceArray.read`."""
        values = np.empty(self.shape, self.dtype)
        self._stream.copy(values.ctypes.data, self._address, self.nbytes, cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self._stream.wait()
        return values

    def copy_from(self, other: DeviceArray) -> None:
        """See `DeviceArray.copy_from`. While the stream records, the copy becomes part of the recording."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._stream.copy(self._address, other.address, self.nbytes, kind)
        self._stream.wait()
