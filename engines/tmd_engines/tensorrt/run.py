"""A plan made executable on the stream of this process. Import after `library.use`.

Plans bring code to the GPU. They come from this user's own cache or from a folder that he named, and even these may not
bring code for the host: `engine_host_code_allowed` stays off.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ..errors import EngineError
from .build import name_and_version
from .library import trt, used
from .log import Log


class LoadedPlan:
    """A plan's weights and code on the GPU; a `Plan` of it runs one size. Raises EngineError if it is not taken."""

    def __init__(self, content: bytes | memoryview) -> None:
        self.log = Log()
        try:
            self._runtime = trt.Runtime(self.log)
        except TypeError:
            raise EngineError(f"{name_and_version()} does not start: {self.log.reason()}.") from None
        buffer = cast(Any, content)  # anything with the buffer protocol; the bindings of 10.3 say another type
        reason = used().refusal(self._runtime, buffer)
        if reason is not None:
            raise EngineError(f"{name_and_version()} refuses the plan: {reason}.")
        self.engine = self._runtime.deserialize_cuda_engine(buffer)
        if self.engine is None:
            raise EngineError(f"{name_and_version()} refuses the plan: {self.log.reason()}.")
        if self.engine.streamable_weights_size:
            # What is left of the memory, as TensorRT sees it; before a context is made, not after.
            self.engine.weight_streaming_budget_v2 = self.engine.get_weight_streaming_automatic_budget()


class Plan:
    """A loaded plan for inputs of these shapes. `scratch` is the memory in bytes that it needs while it runs.

    `kernels` are what an earlier process compiled for it, where its library compiles them at first use.
    Raises EngineError.
    """

    def __init__(self, loaded: LoadedPlan, shapes: Mapping[str, tuple[int, ...]], kernels: bytes | None = None) -> None:
        self._loaded, self._log = loaded, loaded.log
        context, self._save = used().context(loaded.engine, kernels)
        if context is None:
            raise EngineError(f"{name_and_version()} has no memory to run the plan: {self._log.reason()}.")
        self._context: trt.IExecutionContext = context
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"{name_and_version()} refuses {name} of {list(shape)}: {self._log.reason()}.")
        self.scratch = int(self._context.update_device_memory_size_for_shapes())

    def use_scratch(self, address: int, size: int) -> None:
        """Tells where the memory for running is. It may be that of other plans too, which run at other times."""
        self._context.set_device_memory(address, size)

    def enqueue(self, addresses: Mapping[str, int], stream: int) -> None:
        """Asks for a run with the tensors at these addresses of the device. Raises EngineError."""
        for name, address in addresses.items():
            if not self._context.set_tensor_address(name, address):
                raise EngineError(f"{name_and_version()} refuses the address of {name}: {self._log.reason()}.")
        if not self._context.execute_async_v3(stream):
            raise EngineError(f"{name_and_version()} failed: {self._log.reason()}.")

    def kernels(self) -> bytes | None:
        """What was compiled while it ran, to give to the next process; None: there is no such thing."""
        return self._save()

    def not_recordable(self, stream: int) -> str | None:
        """Why its runs cannot be part of a CUDA graph; None: they can."""
        return used().not_capturable(self._context, stream)
