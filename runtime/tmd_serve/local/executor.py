"""The executor of one machine: its models, and one worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..board import Board
from ..errors import Refusal
from ..executor import ModelCard, Plan, Wanted
from .embeds import EmbedsCache
from .library import Library
from .run import Runner
from .worker import Pace, Worker

if TYPE_CHECKING:
    from ..files import DataFolder
    from ..jobs import JobStore
    from ..meters import RunMeters
    from .model import Model


class LocalExecutor:
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
        self._models, self._budget = models, budget
        self._library, self._embeds, self._board = Library(budget, most_loaded), EmbedsCache(), Board()
        runner = Runner(models, self._library, files, self._embeds)
        self._worker = Worker(store, files, runner, self._board, most_bytes, pace, meters)

    @property
    def models(self) -> Sequence[ModelCard]:
        return [model.card for model in self._models.values()]

    @property
    def board(self) -> Board:
        return self._board

    def plan(self, model: str, wanted: Wanted) -> Plan:
        """See `Executor.plan`."""
        if model not in self._models:
            raise Refusal(f"there is no model {model!r} here: see /v1/models.", 404, "model_not_found", "model")
        return self._models[model].plan(wanted, self._budget)

    def start(self) -> None:
        self._worker.start()

    def wake(self) -> None:
        self._worker.wake()

    def stop(self, grace_seconds: float) -> None:
        """See `Executor.stop`; takes at most `UNWIND_SECONDS` more."""
        self._worker.stop(grace_seconds)

    def cancel(self, job_id: str) -> None:
        """See `Executor.cancel`."""
        self._worker.cancel(job_id)
        self._board.changed(job_id)

    def is_ready(self) -> bool:
        return self._worker.is_ready

    def figures(self) -> dict[str, float]:
        """See `Executor.figures`."""
        return {
            "loaded_models": float(len(self._library.loaded)),
            "running_jobs": float(self._worker.is_running),
            "prompt_cache_hits": float(self._embeds.hits),
            "prompt_cache_misses": float(self._embeds.misses),
        }
