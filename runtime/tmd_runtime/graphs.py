"""The engines of a pipeline: each graph is loaded when a stage first needs it, and kept while there is memory."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from os import PathLike
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from tmd_engines.device.cpu import SMALL_BYTES, resolve_threads

from .ahead import Ahead
from .checks import missing_graph
from .errors import UsageFailure
from .forecast import Forecast
from .memory import DECODER, DENOISER, MODES, READER, SECOND, TOGETHER, MemoryChooser

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from pathlib import Path

    from tmd_engines import Bundle, Engine, Manifest
    from tmd_engines.cost.sizing import Memory

    from .clock import Timings
    from .settings import Settings


LastStage = Literal["text", "denoise", "decode"]


def last_stage(manifest: Manifest, keeps_embeds: bool, keeps_latents: bool) -> LastStage:
    """Where a run ends that keeps its embeddings or its latents: a bundle without the graphs to go on ends there.

    A run that keeps neither goes on, and the missing graph is an error.
    """
    if keeps_embeds and "backbone" not in manifest.graphs:
        return "text"
    return "denoise" if keeps_latents and "decoder_first" not in manifest.graphs else "decode"


class Engines:
    """The loaded engines of a pipeline and its clones; each is closed when nobody uses it any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[Engine, int]] = {}  # and how many use it

    def take(self, name: str, load: Callable[[], Engine]) -> Engine:
        """The engine of a graph, loaded if nobody has it or if it serves one user alone."""
        with self._lock:
            engine, users = self._loaded.get(name, (None, 0))
            if engine is None:
                engine = load()
            elif not engine.shares:
                return load()
            self._loaded[name] = engine, users + 1
            return engine

    def leave(self, name: str, engine: Engine) -> None:
        """Gives back what `take` gave."""
        with self._lock:
            shared, users = self._loaded.get(name, (None, 0))
            if shared is engine and users > 1:
                self._loaded[name] = engine, users - 1
                return
            if shared is engine:
                del self._loaded[name]
        engine.close()

    def names(self) -> set[str]:
        return set(self._loaded)


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
        engines: Engines | None = None,
        plans: str | Path | None = None,
    ) -> None:
        if memory not in MODES:
            raise UsageFailure(f"there is no memory mode {memory!r}: choose one of {', '.join(MODES)}.")
        from tmd_engines import EngineError
        from tmd_engines.registry import check_engine

        try:
            check_engine(engine, device)
        except EngineError as error:
            raise UsageFailure(str(error)) from None
        if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
            raise UsageFailure(f"threads is {threads!r}: give a whole number from 1 to 1024, or None.")
        if plans is not None and not isinstance(plans, str | PathLike):
            raise UsageFailure(f"plans is {plans!r}: give a folder, or None.")
        self.arguments = engine, threads, device, memory, plans
        self.threads, self.note = resolve_threads(bundle, threads)
        self._bundle = bundle
        self._wanted, self._chooser, self._forget = memory, MemoryChooser(bundle, engine, device), forget
        self.forecast = Forecast(bundle, self._chooser, f"{engine} {device}", self.threads)
        self.shared = Engines() if engines is None else engines
        self.memory: Memory = "low" if memory == "low" else "all"
        self._engines: dict[str, Engine] = {}
        self._ahead: Ahead | None = None
        self.remarks: list[str] = []  # of the engines that were loaded

    def choose_memory(self, settings: Settings, unused: Collection[str]) -> Memory:
        """See `Pipeline.choose_memory`."""
        if self._wanted == "auto":
            self.memory = self._chooser.choose(settings, unused, self.shared.names())
        return self.memory

    def are_here(self) -> bool:
        """Whether this machine has an engine for every graph; loads none."""
        from tmd_engines import EngineError
        from tmd_engines.device.gpu import split_device
        from tmd_engines.registry import choose, engine_class

        engine, _, device, *_ = self.arguments
        try:
            chosen = {choose(self._bundle, graph, engine, device) for graph in self._bundle.manifest.graphs}
        except EngineError:
            return False
        return all(engine_class(name, split_device(where)[0]).is_here() for name, where in chosen)

    def load(self, name: str, timings: Timings) -> Engine:
        """The engine of a graph. Loading it is timed as `load`. Raises RuntimeFailure if the bundle lacks the graph."""
        if name in self._engines:
            return self._engines[name]
        graphs = self._bundle.manifest.graphs
        if name not in graphs:
            raise missing_graph(name)
        start = perf_counter()
        made = self.shared.take(name, lambda: self._opened_ahead(name) or self._open(name))
        seconds = perf_counter() - start
        self._engines[name] = made
        if made.remark is not None and made.remark not in self.remarks:
            self.remarks.append(made.remark)
        timings.add("load", seconds)
        timings.report("load", len(self._engines), len(graphs), seconds)
        return made

    def load_ahead(self, unused: Collection[str]) -> None:
        """Begins to open the graphs of a run that keeps all of them, each in a thread, where engines allow it.

        Of small models alone: their loading is most of a first run. `load` waits for them, and raises what failed.
        """
        small = sum(file.size for file in self._bundle.manifest.files.values()) <= SMALL_BYTES
        if self.memory == "low":
            self._close_ahead()
        if self.memory == "low" or not small or self._ahead is not None:
            return
        order = (*READER, *DENOISER, *DECODER)
        missing = [name for name in order if name in self._bundle.manifest.graphs and name not in unused]
        missing = [name for name in missing if name not in self.shared.names() and self._opens_beside(name)]
        self._ahead = Ahead(missing, self._open)

    def _opens_beside(self, name: str) -> bool:
        from tmd_engines import EngineError
        from tmd_engines.device.gpu import split_device
        from tmd_engines.registry import choose, engine_class

        engine, _, device, _, plans = self.arguments
        try:
            chosen, where = choose(self._bundle, name, engine, device)
        except EngineError:  # which is raised when the graph is needed
            return False
        return plans is None and engine_class(chosen, split_device(where)[0]).opens_beside

    def _close_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _opened_ahead(self, name: str) -> Engine | None:
        return None if self._ahead is None else self._ahead.take(name)

    def _open(self, name: str) -> Engine:
        from tmd_engines import load as load_engine

        engine, _, device, _, plans = self.arguments
        options: dict[str, Any] = {"engine": engine, "device": device, "threads": self.threads}
        if plans is not None:
            options["plans"] = plans
        return load_engine(self._bundle, name, **options)

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

    def transformer(self, second: bool, timings: Timings, let_go: Callable[[], object]) -> tuple[Engine, Engine]:
        """Backbone and flow head of one of a model's two transformers. With memory "low" the other one is closed;
        `let_go` is called before."""
        wanted, other = (SECOND, DENOISER[:2]) if second else (DENOISER[:2], SECOND)
        if self.memory == "low":
            let_go()
            self._close(set(other))
        backbone, flow_head = (self.load(name, timings) for name in wanted)
        return backbone, flow_head

    def close(self) -> None:
        """Closes every engine. A later stage loads them again."""
        self._close_ahead()
        self._free(set(self._engines))

    def _free(self, graphs: set[str]) -> None:
        self._forget(graphs)
        self._close(graphs)

    def _close(self, graphs: set[str]) -> None:
        for name in graphs & set(self._engines):
            self.shared.leave(name, self._engines.pop(name))
