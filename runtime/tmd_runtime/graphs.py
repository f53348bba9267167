"""The engines of a pipeline: each graph is loaded when a stage first needs it, and kept while there is memory."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

from .checks import missing_graph
from .errors import UsageFailure
from .memory import MODES, TOGETHER, MemoryChooser

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from tmd_engines import Bundle, Engine
    from tmd_engines.cost.sizing import Memory

    from .clock import Timings
    from .settings import Settings


class Graphs:
    """The graphs of one bundle on one engine and device. `forget(graphs)` is called before engines are closed."""

    def __init__(
        self,
        bundle: Bundle,
        engine: str,
        threads: int | None,
        device: str,
        memory: str,
        forget: Callable[[set[str]], object],
    ) -> None:
        if memory not in MODES:
            raise UsageFailure(f"there is no memory mode {memory!r}: choose one of {', '.join(MODES)}.")
        from tmd_engines import EngineError
        from tmd_engines.registry import check_engine

        try:
            check_engine(engine, device)
        except EngineError as error:
            raise UsageFailure(str(error)) from None
        self._bundle, self._engine, self._threads, self._device = bundle, engine, threads, device
        self._wanted, self._chooser, self._forget = memory, MemoryChooser(bundle), forget
        self.memory: Memory = "low" if memory == "low" else "all"
        self._engines: dict[str, Engine] = {}

    def choose_memory(self, settings: Settings, unused: Collection[str]) -> Memory:
        """See `Pipeline.choose_memory`."""
        if self._wanted == "auto":
            self.memory = self._chooser.choose(settings, unused, self._engines)
        return self.memory

    def load(self, name: str, timings: Timings) -> Engine:
        """The engine of a graph. Loading it is timed as `load`. Raises RuntimeFailure if the bundle lacks the graph."""
        if name in self._engines:
            return self._engines[name]
        graphs = self._bundle.manifest.graphs
        if name not in graphs:
            raise missing_graph(name)
        from tmd_engines import load as load_engine

        start = perf_counter()
        engine = load_engine(self._bundle, name, engine=self._engine, device=self._device, threads=self._threads)
        seconds = perf_counter() - start
        self._engines[name] = engine
        timings.add("load", seconds)
        timings.report("load", len(self._engines), len(graphs), seconds)
        return engine

    @contextmanager
    def stage(self, graph: str) -> Iterator[None]:
        """Around the stage of `graph`: with memory "low" no other stage is loaded, and none when it is over."""
        own = next(set(stage) for stage in TOGETHER if graph in stage)
        if self.memory == "low":
            self._free(set(self._engines) - own)
        try:
            yield
        finally:
            if self.memory == "low":
                self._free(own)

    def close(self) -> None:
        """Closes every engine. A later stage loads them again."""
        self._free(set(self._engines))

    def _free(self, graphs: set[str]) -> None:
        self._forget(graphs)
        for name in graphs & set(self._engines):
            self._engines.pop(name).close()
