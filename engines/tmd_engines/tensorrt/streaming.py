"""Builds without holding what is built: weights from their file, the plan into its own.

Import after `library.use`, and where the library has these calls: TensorRT for RTX, TensorRT 11.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import EngineError, quote
from .library import trt

_DROP_EVERY = 0.01  # seconds


@contextmanager
def parsed(parser: trt.OnnxParser, model: bytes, path: str) -> Iterator[bool]:
    """Whether the parser took the graph. Its weights are mapped from their files until the end of the context.

    The builder reads each weight once. Pages that it has read would stay in memory and count as this process's own:
    a thread lets go of them, and the system reads a page again where it is wanted twice.
    """
    if not parser.load_model_proto(model, path):
        yield False
        return
    stop = threading.Event()
    mapped = _map_weights(parser, model, Path(path).parent)

    def drop() -> None:
        while not stop.wait(_DROP_EVERY):
            for each in mapped:
                each.madvise(mmap.MADV_DONTNEED)

    dropper = threading.Thread(target=drop, name="tmd-weights", daemon=True)
    if mapped and hasattr(mmap, "MADV_DONTNEED"):
        dropper.start()
    try:
        yield parser.parse_model_proto()
    finally:
        stop.set()
        if dropper.is_alive():
            dropper.join()


def _map_weights(parser: trt.OnnxParser, model: bytes, folder: Path) -> list[mmap.mmap]:
    """Tells the parser where in memory the weights of the graph are. Raises EngineError."""
    import onnx

    files: dict[str, mmap.mmap] = {}
    addresses: dict[str, int] = {}
    for weight in onnx.load_model_from_string(model).graph.initializer:
        if not weight.external_data:
            continue
        entry = {field.key: field.value for field in weight.external_data}
        name, offset = entry["location"], int(entry.get("offset", 0))
        if name not in files:
            if Path(name).name != name:  # the bundle's own checks refuse it as well
                raise EngineError(f"A weight lies in {quote(name)}, which is not a file beside its graph.")
            with open(folder / name, "rb") as file:
                files[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            addresses[name] = int(np.frombuffer(files[name], np.uint8).ctypes.data)
        size = int(entry.get("length", len(files[name]) - offset))
        if not 0 <= offset <= offset + size <= len(files[name]):
            raise EngineError(f"The weight {quote(weight.name)} lies beyond the end of {name}: copy the bundle again.")
        parser.load_initializer(weight.name, addresses[name] + offset, size)
    return list(files.values())


class _Writer(trt.IStreamWriter):
    """The builder does not look at what `write` returns or raises: `failed` must be looked at afterwards."""

    def __init__(self, out: BinaryIO) -> None:
        trt.IStreamWriter.__init__(self)
        self._out, self.written = out, 0
        self.failed: BaseException | None = None

    def write(self, *given: Any) -> int:
        """Gets the next piece as one `bytes`; the bindings' own signature has data and size."""
        piece = given[0]
        if self.failed is None:
            try:
                self.written += self._out.write(piece)
            except BaseException as error:  # it must not pass through the library's C++
                self.failed = error
        return len(piece)


def write(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, out: BinaryIO) -> int:
    """Builds into `out`; the bytes written, 0 where the build failed. Raises what `out` raises."""
    writer = _Writer(out)
    done = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.failed is not None:
        raise writer.failed
    return writer.written if done else 0
