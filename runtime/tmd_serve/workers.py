"""The executor: models, which say what a request comes to, and workers, which run jobs of one store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import Refusal
from .executor import ModelCard, Plan, Wanted

if TYPE_CHECKING:
    from .board import Board
    from .local.model import Model
    from .local.worker import Worker


class Workers:
    """Runs the jobs of a store by `workers`, which show their progress on `board`. See `Executor`.

    `budget` bounds the estimated bytes of a run (None: nothing does).
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        workers: Sequence[Worker],
        board: Board,
        budget: int | None = None,
    ) -> None:
        self._models, self._workers, self._board = models, workers, board
        self._budget = budget

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
        for worker in self._workers:
            worker.start()

    def wake(self) -> None:
        for worker in self._workers:
            worker.wake()

    def cancel(self, job_id: str) -> None:
        """See `Executor.cancel`."""
        for worker in self._workers:
            worker.cancel(job_id)
        self._board.changed(job_id)

    def is_ready(self) -> bool:
        return any(worker.is_ready for worker in self._workers)

    def stop(self, grace_seconds: float) -> None:
        """See `Executor.stop`; takes at most `UNWIND_SECONDS` more."""
        end = time.monotonic() + grace_seconds
        for worker in self._workers:
            worker.retire()
        for worker in self._workers:
            worker.stop(max(end - time.monotonic(), 0.0))

    def figures(self) -> dict[str, float]:
        """See `Executor.figures`."""
        return {"running_jobs": float(sum(worker.is_running for worker in self._workers))}
