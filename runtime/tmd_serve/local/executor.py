"""The executor of one machine: its models, and one worker, since a run takes the whole GPU or CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..board import Board
from ..workers import Workers
from .embeds import EmbedsCache
from .library import Library
from .run import Runner
from .worker import Pace, Worker

if TYPE_CHECKING:
    from ..files import DataFolder
    from ..jobs import JobStore
    from ..meters import RunMeters
    from .model import Model


class LocalExecutor(Workers):
    """Runs the jobs of `store` on this machine. See `Executor`.

    `most_bytes` is what finished jobs may hold on the disk; `budget` bounds the estimated memory of all loaded models
    together (None: only what is free does), and `most_loaded` their number.
    """

    def __init__(
        self,
        store: JobStore,
        files: DataFolder,
        models: dict[str, Model],
        most_bytes: int,
        budget: int | None = None,
        most_loaded: int | None = None,
        pace: Pace | None = None,
        meters: RunMeters | None = None,
    ) -> None:
        self._library, self._embeds, board = Library(budget, most_loaded), EmbedsCache(), Board()
        runner = Runner(models, self._library, files, self._embeds)
        super().__init__(models, [Worker(store, files, runner, board, most_bytes, pace, meters)], board, budget)

    def figures(self) -> dict[str, float]:
        """See `Executor.figures`."""
        return {
            **super().figures(),
            "loaded_models": float(len(self._library.loaded)),
            "prompt_cache_hits": float(self._embeds.hits),
            "prompt_cache_misses": float(self._embeds.misses),
        }
