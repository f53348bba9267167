"""The interface of all engines: one graph, made executable on one device, on buffers that the caller owns.

    engine = load(bundle, "backbone")
    inputs = {name: engine.empty(name, batch=1, frames=5, ...) for name in engine.inputs}
    outputs = {name: engine.empty(name, batch=1, frames=5, ...) for name in engine.outputs}
    step = engine.bind(inputs, outputs)
    ...write into the inputs...
    step()                                    # results are in the outputs

Which implementations there are, `registry.py` says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from .errors import EngineError, quote
from .holding import ONNXRUNTIME, Holding

if TYPE_CHECKING:
    from .bundle.reader import Bundle
    from .bundle.sections import GraphInfo, TensorSpec

Buffer = Any  # a numpy array on the CPU; other engines may have device buffers


class Step(Protocol):
    """A run of one graph on bound buffers. Calling it returns when the outputs are written. Raises EngineError."""

    def __call__(self) -> None: ...


class BuildStep(NamedTuple):
    """Told while a graph is compiled: `fraction` of the work is done (0 to 1), `left` seconds remain (None: unknown).

    `message` is set where there is something to say once, such as why a plan in the cache does not count.
    """

    graph: str
    fraction: float
    seconds: float
    left: float | None
    message: str | None = None


Progress = Callable[[BuildStep], object]


class Engine(ABC):
    """A graph ready to run, by one thread at a time. `inputs` and `outputs` map tensor names to `TensorSpec`.

    What an engine can do, its class says, without loading its library: the `precisions` of graphs that it computes,
    the `storages` of weights that it reads (`GraphInfo.storage`; None is that of the precision), the `package` that it
    needs and the command that installs it.
    """

    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16", "int8", "fp8", "nvfp4")
    storages: ClassVar[tuple[str | None, ...]] = (None, "fp32", "fp16", "int8")
    package: ClassVar[str]
    install: ClassVar[str]
    holding: ClassVar[Holding] = ONNXRUNTIME  # what its graphs take of a CPU's memory, for `cost.sizing`
    buffer_type: type | None = None  # of the buffers from `empty`; None: numpy arrays, as every engine takes them
    records = False  # whether several steps can be one launch
    remark: str | None = None  # what people should know of this engine's graph, in one sentence or two
    opens_beside = False  # whether threads may open several graphs at the same time
    shares = False  # whether threads may bind and run it at the same time, each on buffers and steps of its own

    def __init__(self, graph: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        self.graph = graph
        self.inputs: dict[str, TensorSpec] = {spec.name: spec for spec in inputs}
        self.outputs: dict[str, TensorSpec] = {spec.name: spec for spec in outputs}

    def shape(self, name: str, **dims: int) -> tuple[int, ...]:
        """Shape of an input or output with its symbols (`batch=1, height=8`) filled in; others in `dims` are ignored.

        Raises EngineError for an unknown name, a symbol without a value, or a value that is not a positive int.
        """
        spec = self.inputs.get(name) or self.outputs.get(name)
        if spec is None:
            known = ", ".join((*self.inputs, *self.outputs))
            raise EngineError(
                f"Graph {self.graph} has no input or output {quote(name)}; it has {quote(known, 400)[1:-1]}."
            )
        try:
            shape = spec.resolve(**dims)
        except KeyError as error:
            shown = ", ".join(map(str, spec.shape))
            raise EngineError(
                f"{name} of graph {self.graph} has shape [{shown}]: give a value for {error.args[0]} as well."
            ) from None
        if any(not hasattr(size, "__index__") or size < 1 for size in shape):
            raise EngineError(
                f"{name} of graph {self.graph} cannot have shape {list(shape)}: every dimension must be a whole number "
                "of at least 1."
            )
        return tuple(map(int, shape))

    @classmethod
    def open(
        cls, bundle: Bundle, graph: str, device: str, threads: int | None, progress: Progress | None = None
    ) -> Engine:
        """The engine of a graph; the arguments are those of `registry.load`. Raises EngineError, BundleError."""
        return cls(bundle, graph, device, threads)  # type: ignore[call-arg, arg-type]  # as implementations are made

    @classmethod
    def is_here(cls) -> bool:
        """Whether it can probably be used on this machine; looks, and loads nothing."""
        return find_spec(cls.package) is not None

    @classmethod
    def prefers(cls, info: GraphInfo, size: int) -> bool:
        """Whether "auto" takes it for such a graph, by what was measured (docs/speed.md), where it is here.

        `size`: bytes of the graph and its weights.
        """
        return cls.takes(info)

    @classmethod
    def takes(cls, info: GraphInfo) -> bool:
        """Whether it computes such a graph."""
        return info.precision in cls.precisions and info.storage in cls.storages

    @classmethod
    def check(cls, bundle: Bundle, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises EngineError if a graph cannot be compiled for inputs of these shapes, as far as that can be known."""
        info = bundle.graph_info(graph)
        if not cls.takes(info):
            raise EngineError(
                f"Graph {graph} is {info.precision} with weights in {info.storage or info.precision}, which this "
                f"engine does not compute: use a bundle in {', '.join(cls.precisions)}."
            )

    @classmethod
    def note(cls) -> str | None:
        """What `tmd-engine doctor` adds where the package is installed: how it computes here, or what is missing."""
        return None

    def compile_range(
        self,
        smallest: Mapping[str, tuple[int, ...]],
        best: Mapping[str, tuple[int, ...]],
        largest: Mapping[str, tuple[int, ...]],
    ) -> None:
        """Compiles once for all shapes of the inputs between two, and keeps the result. Raises EngineError."""
        raise EngineError(f"The engine of graph {self.graph} compiles for one size at a time: give one, not a range.")

    def use_plans(self, folder: str | Path) -> None:
        """Takes compiled graphs from a folder of `tmd-engine build --out` where they fit. Raises EngineError."""
        raise EngineError(
            f"The engine of graph {self.graph} takes no plans: leave them out, or choose the engine that they are for."
        )

    @classmethod
    def note_on(cls, nvidia: Mapping[str, Any] | None) -> str | None:
        """The same for the GPUs that `doctor` found: `driver`, and `gpus` with `name` and `compute_capability`."""
        return None

    @abstractmethod
    def empty(self, name: str, **dims: int) -> Buffer:
        """An uninitialised buffer for the input or output `name`; `dims` as for `shape`. Raises EngineError."""

    @abstractmethod
    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Step:
        """Ties the graph to buffers, all inputs and all outputs by name, and checks them once, here.

        The step keeps the buffers alive. An output may not share memory with an input or another output; inputs may.
        Raises EngineError for a missing or unknown name, or a buffer of wrong dtype, shape or layout.
        """

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """`bind` and one call. For repeated calls on the same buffers keep the step of `bind` instead."""
        self.bind(inputs, outputs)()

    def record(self, work: Callable[[], None]) -> Step:
        """`work` as one launch, where `records` is True; elsewhere `work` itself.

        `work` calls steps of this engine, and of others of its kind, and nothing else; each graph has run before. What
        is recorded stays good as long as its steps do, and reads and writes their buffers. Raises EngineError.
        """
        return work

    @abstractmethod
    def close(self) -> None:
        """Frees the graph's memory now. Its steps raise EngineError from then on. Closing twice is fine."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
