"""Which models are loaded: as many as fit into the memory budget; the one that was used longest ago goes first."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmd_runtime import RuntimeFailure

if TYPE_CHECKING:
    from tmd_engines.cost.sizing import Memory
    from tmd_runtime import Pipeline, Settings

    from .model import Model


@dataclass
class _Shelf:
    """A loaded model: its mode (None: the server's own choice) and the most bytes that a run of it needed."""

    pipeline: Pipeline
    mode: Memory | None
    bytes: int


class Library:
    """The pipelines of a worker. For one thread."""

    def __init__(self, budget: int | None, most_loaded: int | None = None) -> None:
        self._budget, self._most = budget, most_loaded
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names, the latest used last."""
        return tuple(self._shelves)

    def pipeline(self, model: Model, settings: Settings) -> Pipeline:
        """The pipeline for a run with these settings, beside as many others as fit.

        Raises RuntimeFailure if there is not enough memory for it alone.
        """
        estimate = model.estimate(settings)
        need = estimate.peak("all")
        mode: Memory | None = None
        if self._budget is not None and need > self._budget:
            mode, need = "low", estimate.peak("low")
        shelf = self._shelves.get(model.name)
        if shelf is not None and shelf.mode != mode:
            self._drop(model.name)
            shelf = None
        held = max(need, 0 if shelf is None else shelf.bytes)
        self._make_room(model.name, held)
        if shelf is None:
            shelf = self._shelves[model.name] = _Shelf(model.open(mode), mode, held)
        shelf.bytes = held
        self._shelves.move_to_end(model.name)
        try:
            shelf.pipeline.choose_memory(settings)
        except RuntimeFailure:
            if len(self._shelves) == 1:
                raise
            self._make_room(model.name, None)
            shelf.pipeline.choose_memory(settings)
        return shelf.pipeline

    def _make_room(self, name: str, need: int | None) -> None:
        """Closes others until a model that needs so many bytes fits (None: all of them)."""
        for other in [other for other in self._shelves if other != name]:
            held = sum(shelf.bytes for key, shelf in self._shelves.items() if key != name)
            count = len(set(self._shelves) | {name})
            fits = need is not None and (self._budget is None or held + need <= self._budget)
            if fits and (self._most is None or count <= self._most):
                return
            self._drop(other)

    def _drop(self, name: str) -> None:
        with suppress(Exception):  # an engine that cannot be closed is forgotten all the same
            self._shelves[name].pipeline.close()
        del self._shelves[name]

    def close(self) -> None:
        for name in self.loaded:
            self._drop(name)
