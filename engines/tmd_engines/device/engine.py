"""What engines on a device have in common: buffers there, one compiled graph per combination of sizes, bound steps.

Buffers from `empty` stay on the device. Numpy arrays may be bound as well: those among the inputs are copied to the
device before every run, those among the outputs back after it.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.manifest import GraphInfo
from ..engine import Engine, Progress
from ..errors import EngineError, one_line
from .array import DeviceArray
from .buffers import check_buffers, check_graph_types

if TYPE_CHECKING:
    from ..bundle.reader import Bundle

Shapes = tuple[tuple[int, ...], ...]


class DeviceEngine(Engine):
    """An engine whose buffers are `DeviceArray`s. `_compile` and `_runner` are an implementation's own."""

    buffer_type = DeviceArray

    @classmethod
    def open(
        cls, bundle: Bundle, graph: str, device: str, threads: int | None, progress: Progress | None = None
    ) -> Engine:
        """See `Engine.open`."""
        return cls(bundle, graph, device, threads, progress=progress)  # type: ignore[call-arg, arg-type]

    def __init__(self, name: str, graph: str, info: GraphInfo) -> None:
        super().__init__(graph, info.inputs, info.outputs)
        check_graph_types(name, graph, info, self.precisions)
        self._open = True
        self._compiled: weakref.WeakValueDictionary[Shapes, Any] = weakref.WeakValueDictionary()
        self._latest: Any = None
        self._steps: weakref.WeakSet[BoundStep] = weakref.WeakSet()

    @abstractmethod
    def array(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """An uninitialised array on the device. Raises EngineError."""

    @abstractmethod
    def _compile(self, shapes: Shapes) -> Any:
        """The graph ready to run for inputs of these shapes; anything that weak references work on."""

    @abstractmethod
    def _runner(
        self, compiled: Any, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> Callable[[], None]:
        """One run on these arrays. It returns when the outputs are written, and may raise anything."""

    def empty(self, name: str, **dims: int) -> DeviceArray:
        """Uninitialised buffer on the device for the input or output `name`. Raises EngineError."""
        shape = self.shape(name, **dims)
        return self.array(shape, (self.inputs.get(name) or self.outputs[name]).dtype)

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> BoundStep:
        """See `Engine.bind`. Compiles the graph when these sizes are new, which can take minutes."""
        self._check_open()
        check_buffers(self, inputs, outputs)
        shapes = tuple(tuple(inputs[name].shape) for name in self.inputs)
        compiled = self._compiled.get(shapes)
        if compiled is None:
            self._latest = None  # two compiled copies of a large model do not fit side by side
            compiled = self._compiled[shapes] = self._compile(shapes)
        self._latest = compiled
        there = {id(value): self._mirror(value) for value in (*inputs.values(), *outputs.values())}
        given, made = ({name: there[id(value)] for name, value in side.items()} for side in (inputs, outputs))
        step = BoundStep(
            self.graph,
            self._runner(compiled, given, made),
            [(value, given[name]) for name, value in inputs.items() if isinstance(value, np.ndarray)],
            [(value, made[name]) for name, value in outputs.items() if isinstance(value, np.ndarray)],
            (compiled, given, made, dict(inputs), dict(outputs)),
        )
        self._steps.add(step)
        return step

    def close(self) -> None:
        """See `Engine.close`."""
        for step in self._steps:
            step.release()
        self._steps.clear()
        self._open, self._latest = False, None

    def _check_open(self) -> None:
        if not self._open:
            raise EngineError(f"The engine of graph {self.graph} is closed: load the graph again.")

    def _mirror(self, value: Any) -> DeviceArray:
        return self.array(value.shape, value.dtype.name) if isinstance(value, np.ndarray) else value


class BoundStep:
    """A run on bound buffers, which it keeps alive."""

    __slots__ = ("__weakref__", "_back", "_forth", "_graph", "_kept", "_run")

    def __init__(self, graph: str, run: Callable[[], None], forth: Any, back: Any, kept: object) -> None:
        self._graph, self._forth, self._back, self._kept = graph, forth, back, kept
        self._run: Callable[[], None] | None = run

    def __call__(self) -> None:
        if self._run is None:
            raise EngineError(f"The engine of graph {self._graph} was closed: load the graph again.")
        try:
            for values, array in self._forth:
                array.write(values)
            self._run()
            for values, array in self._back:
                values[...] = array.read()
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"Graph {self._graph} failed on its device: {one_line(error)}") from error

    def release(self) -> None:
        self._run = self._forth = self._back = self._kept = None
