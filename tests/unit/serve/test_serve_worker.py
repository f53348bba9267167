"""What a worker does with jobs, leases and signals to stop, with a runner that only waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import wait_for
from tests.helpers.serving import a_job
from tmd_engines.device.running import RUNNING, stop_step
from tmd_runtime import RuntimeFailure
from tmd_serve.board import Board
from tmd_serve.files import DataFolder
from tmd_serve.jobs import Job, Progress
from tmd_serve.local.worker import Pace, RunFailed, RunLost, Worker
from tmd_serve.store.database import Database
from tmd_serve.store.sql_jobs import SqlJobs

QUICK = Pace(lease=5.0, beat=0.02, poll=0.02, clean=0.05)


class Step:
    """A step of an engine that runs until it is stopped."""

    def __init__(self) -> None:
        self.stopped = threading.Event()

    def stop(self) -> None:
        self.stopped.set()


class Waiting:
    """A runner whose runs are one long step, until they are stopped or `let_go` is set."""

    def __init__(self, files: DataFolder) -> None:
        self.files, self.let_go, self.runs = files, threading.Event(), list[str]()
        self.failure: Exception | None = None
        self.is_closed = self.is_deaf = False

    def make(self, job: Job, show: Callable[[Progress], bool], on_preview: Callable[[bytes], object]) -> dict[str, Any]:
        self.runs.append(job.id)
        if self.failure is not None:
            raise self.failure
        self.files.write(job.id, "video.mp4", b"video")
        show(Progress("backbone", 1, 2, 0.5))
        step = Step()
        RUNNING[threading.get_ident()] = step
        try:
            while not self.let_go.wait(0.005):
                if step.stopped.is_set() and not self.is_deaf:
                    raise RuntimeFailure("the step was stopped")
        finally:
            del RUNNING[threading.get_ident()]
        return {"file": "video.mp4", "bytes": 5, "all_bytes": 5, "stage_seconds": {}}

    def interrupt(self, thread: int) -> None:
        stop_step(thread)

    def close(self) -> None:
        self.is_closed = True


class Line:
    """A store, a runner and a worker in one folder."""

    def __init__(self, folder: Path, pace: Pace = QUICK, most_bytes: int = 1000, keep_seconds: float = 60) -> None:
        self.store = SqlJobs(Database.of_file(folder / "jobs.sqlite3"), keep_seconds=keep_seconds)
        self.files, self.board = DataFolder(folder), Board()
        self.runner = Waiting(self.files)
        self.worker = Worker(self.store, self.files, self.runner, self.board, most_bytes, pace)

    def add(self) -> str:
        job = self.store.add(a_job(), 100)
        self.worker.wake()
        return job.id

    def status(self, job_id: str) -> tuple[str, str | None]:
        job = self.store.get(job_id)
        assert job is not None
        return job.status, job.error_code

    def is_running(self, job_id: str) -> bool:
        return job_id in self.runner.runs and self.board.sight(job_id) is not None


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    made.worker.start()
    yield made
    made.runner.let_go.set()
    made.worker.stop(0)


def test_a_job_runs_to_its_end_and_its_progress_is_on_the_board_and_in_the_store(line: Line) -> None:
    job = line.add()
    wait_for(lambda: line.is_running(job))
    sight = line.board.sight(job)
    assert sight is not None and sight.progress.stage in ("", "backbone")

    def beaten() -> bool:
        found = line.store.get(job)
        return found is not None and found.progress == Progress("backbone", 1, 2, 0.5)

    wait_for(beaten)
    line.runner.let_go.set()
    wait_for(lambda: line.status(job) == ("completed", None))
    wait_for(lambda: line.board.sight(job) is None)


def test_a_cancelled_job_stops_within_its_step_and_leaves_no_file(line: Line) -> None:
    job, after = line.add(), line.add()
    wait_for(lambda: line.is_running(job))
    line.store.cancel(job)
    line.worker.cancel(job)
    wait_for(lambda: line.status(job) == ("failed", "cancelled"))
    wait_for(lambda: line.is_running(after))
    assert not line.files.folder(job).exists()
    line.runner.let_go.set()
    wait_for(lambda: line.status(after) == ("completed", None))


def test_a_job_that_another_server_cancels_or_deletes_stops(line: Line) -> None:
    cancelled, deleted = line.add(), line.add()
    wait_for(lambda: line.is_running(cancelled))
    line.store.cancel(cancelled)
    wait_for(lambda: line.status(cancelled) == ("failed", "cancelled"))
    wait_for(lambda: line.is_running(deleted))
    line.store.remove(deleted)
    wait_for(lambda: not line.worker.is_running)
    assert not line.files.folder(deleted).exists()


def test_a_run_that_failed_says_why_and_the_next_one_runs(line: Line) -> None:
    for error, code, word in (
        (RuntimeFailure("the stage decode gave NaN."), "run_failed", "NaN"),
        (MemoryError(), "out_of_memory", "memory"),
        (OSError(28, "No space left on device"), "storage_failed", "No space left"),
        (KeyError("secret"), "server_error", "KeyError"),
    ):
        line.runner.failure = error
        job = line.add()
        wait_for(lambda job=job, code=code: line.status(job) == ("failed", code))  # type: ignore[misc]
        found = line.store.get(job)
        assert found is not None and word in (found.error_message or "") and "secret" not in (found.error_message or "")
    line.runner.failure = None
    line.runner.let_go.set()
    job = line.add()
    wait_for(lambda: line.status(job) == ("completed", None))


def test_a_run_that_failed_elsewhere_keeps_its_code(line: Line) -> None:
    line.runner.failure = RunFailed("out_of_memory", "there is not enough memory.")
    job = line.add()
    wait_for(lambda: line.status(job) == ("failed", "out_of_memory"))


def test_a_run_that_is_lost_elsewhere_is_begun_again_three_times_at_most(line: Line) -> None:
    line.runner.failure = RunLost("the replica died")
    job = line.add()
    wait_for(lambda: line.status(job) == ("failed", "attempts_exhausted"))
    assert line.runner.runs == [job] * 3


def test_a_server_that_ends_lets_the_run_end_in_its_time(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.worker.start()
    job = line.add()
    wait_for(lambda: line.is_running(job))
    threading.Timer(0.1, line.runner.let_go.set).start()
    line.worker.stop(10)
    assert line.status(job) == ("completed", None)
    assert line.runner.is_closed and not line.worker.is_ready


def test_a_server_that_ends_gives_a_long_run_back_without_an_attempt(tmp_path: Path) -> None:
    line = Line(tmp_path)
    line.worker.start()
    job, waits = line.add(), line.add()
    wait_for(lambda: line.is_running(job))
    line.worker.stop(0)
    for job_id in (job, waits):
        found = line.store.get(job_id)
        assert found is not None and (found.status, found.attempts) == ("queued", 0)


def test_a_run_that_cannot_be_stopped_is_given_back_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmd_serve.local.worker.UNWIND_SECONDS", 0.1)
    line = Line(tmp_path)
    line.runner.is_deaf = True
    line.worker.start()
    job = line.add()
    wait_for(lambda: line.is_running(job))
    line.worker.stop(0)
    assert line.status(job) == ("queued", None)
    line.runner.let_go.set()  # it ends after all, and has no say any more
    wait_for(lambda: line.runner.is_closed)
    assert line.status(job) == ("queued", None)


def test_a_run_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    line = Line(tmp_path, Pace(beat=0.02, poll=0.02, most=0.1))
    line.worker.start()
    job = line.add()
    wait_for(lambda: line.status(job) == ("failed", "time_limit"))
    line.worker.stop(0)


def test_old_jobs_are_forgotten_with_their_files(tmp_path: Path) -> None:
    line = Line(tmp_path, keep_seconds=0.2)
    line.runner.let_go.set()
    line.worker.start()
    job = line.add()
    wait_for(lambda: line.store.get(job) is None)
    assert job in line.runner.runs
    wait_for(lambda: not line.files.folder(job).exists())
    line.worker.stop(1)


def test_a_worker_that_lost_its_lease_stops_and_leaves_the_job_to_the_other(tmp_path: Path) -> None:
    line = Line(tmp_path, Pace(lease=0.0, beat=0.2, poll=5))
    line.worker.start()
    job = line.add()
    wait_for(lambda: line.is_running(job))
    other = line.store.claim("other", 60, None, 0)
    assert other is not None and other.id == job
    wait_for(lambda: not line.worker.is_running)
    assert line.status(job) == ("in_progress", None)
    assert line.files.folder(job).exists()
    line.worker.stop(0)
