"""The executor of one machine: one thread runs jobs, another one keeps their leases and the retention.

A run takes the whole GPU or CPU, so jobs run one after the other. While a job runs, the second thread renews its lease,
learns from the store whether it was cancelled elsewhere, and stops its step if it shall end.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tmd_engines import BundleError, EngineError
from tmd_engines.device.running import AGAIN_SECONDS, stop_step
from tmd_runtime import RuntimeFailure

from ..board import Board
from ..errors import Refusal
from ..executor import ModelCard, Plan, Wanted
from ..jobs import CANCELLED, JobStore, Progress
from .embeds import EmbedsCache
from .library import Library
from .run import Runner

if TYPE_CHECKING:
    from ..files import DataFolder
    from ..jobs import Job
    from ..meters import RunMeters
    from ..settings import Retention
    from .model import Model

_LOG = logging.getLogger("tmd_serve.jobs")

Reason = Literal["cancelled", "shutdown", "lost"]


@dataclass(frozen=True)
class Pace:
    """How often things happen, in seconds. `patience` is how long the oldest job lets others of the same group go
    first; a `lease` is renewed every `beat`; `poll` is for jobs that other servers accepted."""

    lease: float = 30.0
    beat: float = 2.0
    poll: float = 1.0
    patience: float = 20.0
    clean: float = 60.0


@dataclass
class _Current:
    """The job that runs, and why it shall end before its time."""

    id: str
    progress: Progress = field(default_factory=Progress)
    reason: Reason | None = None


class LocalExecutor:
    """Runs the jobs of `store` on this machine. See `Executor`."""

    def __init__(
        self,
        store: JobStore,
        files: DataFolder,
        models: dict[str, Model],
        retention: Retention,
        budget: int | None = None,
        most_loaded: int | None = None,
        pace: Pace | None = None,
        meters: RunMeters | None = None,
    ) -> None:
        """`budget` bounds the estimated bytes of all loaded models together; None: only free memory does."""
        self._store, self._files, self._models, self._retention = store, files, models, retention
        self._pace = pace or Pace()
        self._budget, self._meters = budget, meters
        self._library = Library(budget, most_loaded)
        self._runner = Runner(models, self._library, files, EmbedsCache())
        self._board = Board()
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"[-128:]
        self._lock = threading.Lock()
        self._current: _Current | None = None
        self._news, self._hurry = threading.Event(), threading.Event()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

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
        self._keeper.start()

    def wake(self) -> None:
        self._news.set()

    def cancel(self, job_id: str) -> None:
        """See `Executor.cancel`."""
        self._end(job_id, "cancelled")
        self._board.changed(job_id)

    def is_ready(self) -> bool:
        return self._worker.is_alive() and not self._stopping.is_set()

    def stop(self, grace_seconds: float) -> None:
        """See `Executor.stop`."""
        self._stopping.set()
        self._news.set()
        self._worker.join(grace_seconds)
        while self._worker.is_alive():
            current = self._current
            if current is not None:
                self._end(current.id, "shutdown")
            self._worker.join(AGAIN_SECONDS)
        self._hurry.set()
        if self._keeper.is_alive():
            self._keeper.join()

    def figures(self) -> dict[str, float]:
        """See `Executor.figures`."""
        return {
            "loaded_models": float(len(self._library.loaded)),
            "running_jobs": float(self._current is not None),
            "prompt_cache_hits": float(self._runner.embeds.hits),
            "prompt_cache_misses": float(self._runner.embeds.misses),
        }

    def _end(self, job_id: str, reason: Reason) -> None:
        with self._lock:
            current = self._current
            if current is not None and current.id == job_id and current.reason is None:
                current.reason = reason
        self._hurry.set()

    # The worker's thread.

    def _work(self) -> None:
        group: str | None = None
        while not self._stopping.is_set():
            self._news.clear()
            try:
                job = self._store.claim(self._name, self._pace.lease, group, self._pace.patience)
            except Exception:
                _LOG.exception("no job can be claimed")
                job = None
            if job is None:
                self._news.wait(self._pace.poll)
                continue
            group = job.group
            try:
                self._run(job)
            except Exception:
                # The store is what fails here. The lease runs out, and the job is claimed again.
                _LOG.exception("a job is lost to this worker", extra={"job": job.id})
            finally:
                with self._lock:
                    self._current = None
                self._board.clear(job.id)
        self._library.close()

    def _run(self, job: Job) -> None:
        begin = time.monotonic()
        current = _Current(job.id)
        with self._lock:
            self._current = current
        self._hurry.set()
        _LOG.info("job begins", extra={"job": job.id, "model": job.model, "attempt": job.attempts})
        self._board.show(job.id, current.progress)

        def show(progress: Progress) -> bool:
            current.progress = progress
            self._board.show(job.id, progress)
            return current.reason is None

        try:
            result = self._runner.make(job, show, lambda png: self._board.show_preview(job.id, png))
        except Exception as error:
            self._failed(job, current, error)
        else:
            self._done(job, current, result)
        _LOG.info("job is over", extra={"job": job.id, "seconds": round(time.monotonic() - begin, 3)})

    def _done(self, job: Job, current: _Current, result: dict[str, Any]) -> None:
        with self._lock:
            cancelled = current.reason == "cancelled"
        if cancelled:
            self._store.fail(job.id, self._name, CANCELLED, "the job was cancelled.", self._retention.seconds)
        elif self._store.complete(job.id, self._name, result, self._retention.seconds):
            if self._meters is not None:
                self._meters.completed(job, result)
            return
        self._clean_up(job.id)

    def _failed(self, job: Job, current: _Current, error: Exception) -> None:
        if current.reason == "shutdown":
            self._store.give_back(job.id, self._name)
            return
        code, message = (CANCELLED, "the job was cancelled.") if current.reason is not None else verdict(error)
        if code == "server_error":
            _LOG.error("a run failed", exc_info=error, extra={"job": job.id})
        elif code != CANCELLED:
            _LOG.warning("a run failed", extra={"job": job.id, "reason": message})
        self._store.fail(job.id, self._name, code, message, self._retention.seconds)
        if self._meters is not None:
            self._meters.failed(job, code)
        self._clean_up(job.id)

    def _clean_up(self, job_id: str) -> None:
        """Removes the files of a job that was deleted while it ran, or that has no result."""
        job = self._store.get(job_id)
        if job is None or job.status == "failed":
            self._files.remove(job_id)

    # The keeper's thread.

    def _keep(self) -> None:
        beaten, cleaned = 0.0, 0.0
        while self._worker.is_alive() or not self._stopping.is_set():
            current = self._current
            ending = current is not None and current.reason is not None
            if ending:
                stop_step(self._worker.ident or 0)
            now = time.monotonic()
            try:
                if current is not None and not ending and now - beaten >= self._pace.beat:
                    beaten = now
                    if not self._store.beat(current.id, self._name, self._pace.lease, current.progress):
                        job = self._store.get(current.id)
                        wanted = job is not None and not job.cancelling
                        self._end(current.id, "lost" if wanted else "cancelled")
                if now - cleaned >= self._pace.clean:
                    cleaned = now
                    self._forget_old()
            except Exception:
                _LOG.exception("leases and retention fail")
            self._hurry.wait(AGAIN_SECONDS if ending else self._pace.beat)
            self._hurry.clear()

    def _forget_old(self) -> None:
        for job_id in self._store.expired(self._retention.bytes):
            self._store.remove(job_id)
            self._files.remove(job_id)
            _LOG.info("job is forgotten", extra={"job": job_id})


def verdict(error: Exception) -> tuple[str, str]:
    """A code and a sentence for a run that failed."""
    if isinstance(error, RuntimeFailure | BundleError | EngineError):
        return "run_failed", str(error)
    if isinstance(error, MemoryError):
        return "out_of_memory", "there is not enough memory for this run: choose fewer frames or a smaller size."
    if isinstance(error, OSError):
        return "storage_failed", f"the server cannot keep the result ({error.strerror or error}): make room there."
    return "server_error", f"the run failed by a fault of the server ({type(error).__name__}): its log says more."
