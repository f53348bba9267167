"""A worker: one thread claims jobs and runs them, another one keeps their leases and forgets old jobs.

A run takes the whole GPU or CPU, so jobs run one after the other. While a job runs, the second thread renews its lease,
learns from the store whether it was cancelled elsewhere, and stops its step if it shall end. Several workers, on
several machines, may share one store.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tmd_engines import BundleError, EngineError
from tmd_engines.device.running import AGAIN_SECONDS
from tmd_runtime import RuntimeFailure

from ..jobs import CANCELLED, JobStore, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..board import Board
    from ..files import DataFolder
    from ..jobs import Job
    from ..meters import RunMeters

_LOG = logging.getLogger("tmd_serve.jobs")

Reason = Literal["cancelled", "shutdown", "lost", "time_limit"]
_WORDS = {CANCELLED: "the job was cancelled."}
UNWIND_SECONDS = 10.0
"""How long a run that was told to stop may take to do so; an engine that is being built cannot be stopped."""


@dataclass(frozen=True)
class Pace:
    """How often things happen, in seconds: a `lease` is renewed every `beat`; `poll` is for jobs that other servers
    accepted; old jobs are forgotten every `clean`. At most `overtaking` jobs go before the oldest one because they
    share what is loaded. A run of more than `most` seconds is stopped."""

    lease: float = 30.0
    beat: float = 2.0
    poll: float = 1.0
    clean: float = 60.0
    overtaking: int = 4
    most: float = 3600.0


class RunFailed(Exception):
    """A run failed on another machine, which gave a code and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RunLost(Exception):
    """What ran a job on another machine is gone; the job may run again."""


class Runs(Protocol):
    """What runs one job in the calling thread; see `run.Runner`."""

    def make(self, job: Job, show: Callable[[Progress], bool], on_preview: Callable[[bytes], object]) -> dict[str, Any]:
        """Runs a job and writes its files. Returns `Job.result`.

        `show` gets the progress after each step, and returns False to stop the run; `on_preview` gets a PNG file.
        Raises as a pipeline does, or RunFailed or RunLost.
        """

    def interrupt(self, thread: int) -> None:
        """Stops the step that `make` runs in the thread of this number. Called again until `make` has ended."""

    def close(self) -> None: ...


@dataclass
class _Current:
    """The job that runs, and why it shall end before its time."""

    id: str
    begin: float = field(default_factory=time.monotonic)
    progress: Progress = field(default_factory=Progress)
    reason: Reason | None = None


class Worker:
    """Runs the jobs of `store` with `runner`, whose files lie in `files`, until it is stopped.

    `most_bytes` is how much finished jobs may hold.
    """

    def __init__(
        self,
        store: JobStore,
        files: DataFolder,
        runner: Runs,
        board: Board,
        most_bytes: int,
        pace: Pace | None = None,
        meters: RunMeters | None = None,
    ) -> None:
        self._store, self._files, self._runner, self._board = store, files, runner, board
        self._most_bytes, self._pace, self._meters = most_bytes, pace or Pace(), meters
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"[-128:]
        # Held where the current job changes, so that a stop never meets the job after the one it is meant for.
        self._lock = threading.Lock()
        self._current: _Current | None = None
        self._news, self._hurry, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    @property
    def is_running(self) -> bool:
        """Whether it has a job."""
        return self._current is not None

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        self._thread.start()
        self._keeper.start()

    def wake(self) -> None:
        """There may be a job."""
        self._news.set()

    def cancel(self, job_id: str) -> None:
        """Stops a job within a step, if this worker has it."""
        self._end(job_id, "cancelled")

    def retire(self) -> None:
        """Takes no job any more."""
        self._stopping.set()
        self._news.set()

    def stop(self, grace_seconds: float) -> None:
        """Takes no job any more. One that runs may end in this time, and is given back otherwise."""
        self.retire()
        if self._thread.ident is None:
            return
        self._thread.join(grace_seconds)
        until = time.monotonic() + UNWIND_SECONDS
        while self._thread.is_alive() and time.monotonic() < until:
            current = self._current
            if current is not None:
                self._end(current.id, "shutdown")
            self._thread.join(AGAIN_SECONDS)
        current = self._current
        if self._thread.is_alive() and current is not None:
            _LOG.warning("a run does not stop; its job is queued again", extra={"job": current.id})
            self._store.give_back(current.id, self._name)
        self._hurry.set()
        self._keeper.join(self._pace.beat + 1)

    def _end(self, job_id: str, reason: Reason) -> None:
        with self._lock:
            current = self._current
            if current is not None and current.id == job_id and current.reason is None:
                current.reason = reason
        self._hurry.set()

    # The thread that runs jobs.

    def _work(self) -> None:
        group: str | None = None
        while not self._stopping.is_set():
            self._news.clear()
            try:
                job = self._store.claim(self._name, self._pace.lease, group, self._pace.overtaking)
            except Exception:
                _LOG.exception("no job can be claimed")
                job = None
            if job is None:
                self._news.wait(self._pace.poll)
                continue
            group = job.group
            current = _Current(job.id)
            with self._lock:
                self._current = current
            self._hurry.set()
            try:
                self._run(job, current)
            except Exception:
                # The store is what fails here. The lease runs out, and the job is claimed again.
                _LOG.exception("a job is lost to this worker", extra={"job": job.id})
            finally:
                with self._lock:
                    self._current = None
                self._board.clear(job.id)
        self._runner.close()

    def _run(self, job: Job, current: _Current) -> None:
        _LOG.info("job begins", extra={"job": job.id, "model": job.model, "attempt": job.attempts})
        self._board.show(job.id, current.progress)

        def show(progress: Progress) -> bool:
            current.progress = progress
            self._board.show(job.id, progress)
            return current.reason is None

        try:
            result = self._runner.make(job, show, lambda png: self._board.show_preview(job.id, png))
        except Exception as error:
            outcome = self._failed(job, current, error)
        else:
            outcome = self._done(job, current, result)
        seconds = round(time.monotonic() - current.begin, 3)
        _LOG.info("job is over", extra={"job": job.id, "outcome": outcome, "seconds": seconds})

    def _done(self, job: Job, current: _Current, result: dict[str, Any]) -> str:
        if current.reason == "cancelled":
            self._store.fail(job.id, self._name, CANCELLED, _WORDS[CANCELLED])
        elif self._store.complete(job.id, self._name, result):
            if self._meters is not None:
                self._meters.completed(job, result)
            return "completed"
        self._clean_up(job.id)
        return current.reason or "lost"

    def _failed(self, job: Job, current: _Current, error: Exception) -> str:
        if current.reason == "shutdown":
            self._store.give_back(job.id, self._name)
            return "given back"
        if current.reason is None and isinstance(error, RunLost):
            _LOG.warning("a run was lost: %s", error, extra={"job": job.id})
            self._store.give_back(job.id, self._name, counted=True)
            return "lost"
        if current.reason == "time_limit":
            most = self._pace.most
            code = "time_limit"
            message = f"the run took more than {most:g} s, which the server allows: choose fewer steps or frames."
        elif current.reason is not None:
            code, message = CANCELLED, _WORDS[CANCELLED]
        else:
            code, message = verdict(error)
            fault = error if code == "server_error" else None
            _LOG.warning("a run failed: %s", message, exc_info=fault, extra={"job": job.id})
        self._store.fail(job.id, self._name, code, message)
        if self._meters is not None:
            self._meters.failed(job, code)
        self._clean_up(job.id)
        return code

    def _clean_up(self, job_id: str) -> None:
        """Removes the files of a job that has no result, or was deleted while it ran."""
        job = self._store.get(job_id)
        if job is None or job.status == "failed":
            self._files.remove(job_id)

    # The thread that keeps leases.

    def _keep(self) -> None:
        beaten = cleaned = 0.0
        while self._thread.is_alive():
            ending = self._stop_what_shall_end()
            now = time.monotonic()
            try:
                current = self._current
                if current is not None and not ending and now - beaten >= self._pace.beat:
                    beaten = now
                    self._beat(current)
                if now - cleaned >= self._pace.clean:
                    cleaned = now
                    self._forget_old()
            except Exception:
                _LOG.exception("leases and retention fail")
            self._hurry.wait(AGAIN_SECONDS if ending else self._pace.beat)
            self._hurry.clear()

    def _stop_what_shall_end(self) -> bool:
        """Stops the running step of a job that shall end; it may just be about to begin, so this is repeated."""
        with self._lock:
            current = self._current
            ending = current is not None and current.reason is not None
            if ending:
                self._runner.interrupt(self._thread.ident or 0)
        return ending

    def _beat(self, current: _Current) -> None:
        if time.monotonic() - current.begin > self._pace.most:
            self._end(current.id, "time_limit")
        elif not self._store.beat(current.id, self._name, self._pace.lease, current.progress):
            job = self._store.get(current.id)
            self._end(current.id, "cancelled" if job is None or job.cancelling else "lost")

    def _forget_old(self) -> None:
        for job_id in self._store.expired(self._most_bytes):
            self._store.remove(job_id)
            self._files.remove(job_id)
            _LOG.info("job is forgotten", extra={"job": job_id})


def verdict(error: Exception) -> tuple[str, str]:
    """A code and a sentence for a run that failed."""
    if isinstance(error, RunFailed):
        return error.code, str(error)
    if isinstance(error, RuntimeFailure | BundleError | EngineError):
        return "run_failed", str(error)
    if isinstance(error, MemoryError):
        return "out_of_memory", "there is not enough memory for this run: choose fewer frames or a smaller size."
    if isinstance(error, OSError):
        return "storage_failed", f"the server cannot keep the result ({error.strerror or error}): make room there."
    return "server_error", f"the run failed by a fault of the server ({type(error).__name__}): its log says more."
