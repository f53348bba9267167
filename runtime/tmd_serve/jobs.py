"""A job, and the interface of what keeps jobs.

A job is one video or one still. It is `queued` when it is accepted, `in_progress` while a worker has it on lease, and
ends as `completed` or `failed`. A worker renews its lease while it works; a job whose lease has run out is claimed
again, a bounded number of times.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Status = Literal["queued", "in_progress", "completed", "failed"]
STATUSES: tuple[Status, ...] = ("queued", "in_progress", "completed", "failed")
CANCELLED = "cancelled"
JOB_ID = re.compile(r"video_[0-9a-f]{32}")


def new_id() -> str:
    return f"video_{secrets.token_hex(16)}"


@dataclass(frozen=True)
class Progress:
    """Where a run is: `step` of `of_steps` of a stage are over. `fraction` in 0..1 is of the whole run."""

    stage: str = ""
    step: int = 0
    of_steps: int = 0
    fraction: float = 0.0
    eta_seconds: float | None = None


@dataclass(frozen=True)
class Job:
    """One job, as it is stored. Times are seconds since 1970.

    `request` is what a worker needs to run it (prompt, wishes with the seed, preview, picture); `resolved` is what
    the API shows of its settings; `group` is equal for jobs that share loaded graphs and buffers. `result` holds what a
    finished run says of itself (file, type, sha256, bytes, stage_seconds, warnings).
    """

    id: str
    model: str
    request: dict[str, Any]
    resolved: dict[str, Any]
    group: str = ""
    estimated_seconds: float | None = None
    owner: str = ""
    idempotency_key: str | None = None
    fingerprint: str = ""
    status: Status = "queued"
    created_at: float = 0.0
    started_at: float | None = None
    completed_at: float | None = None
    expires_at: float | None = None
    attempts: int = 0
    cancelling: bool = False
    revision: int = 0
    error_code: str | None = None
    error_message: str | None = None
    progress: Progress = field(default_factory=Progress)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return self.status in ("completed", "failed")


class QueueFull(Exception):
    """No job more may wait."""


class StoreFailure(Exception):
    """The store does not answer, or cannot keep anything: nothing has happened, and it may be tried again."""


class JobStore(Protocol):
    """Keeps jobs. Every method is one transaction, may be called from any thread, and has happened when it returns.

    Each may raise StoreFailure.
    """

    def add(self, job: Job, most_waiting: int) -> Job:
        """Accepts a job, or returns the one that its owner gave the same idempotency key.

        Raises QueueFull if `most_waiting` jobs wait already.
        """

    def get(self, job_id: str) -> Job | None: ...

    def page(self, limit: int, after: str | None, newest_first: bool) -> tuple[list[Job], bool]:
        """Jobs in the order of their coming, those behind `after`, and whether there are more.

        Raises KeyError if there is no job `after`.
        """

    def position(self, job: Job) -> int:
        """How many jobs wait in front of a queued one."""

    def waiting(self) -> tuple[int, float]:
        """How many jobs wait or run, and the sum of their estimated seconds."""

    def counts(self) -> dict[Status, int]: ...

    def claim(self, worker: str, lease_seconds: float, group: str | None, overtaking: int) -> Job | None:
        """A job for `worker`, in progress from now on: the oldest one, or the oldest one of `group` while fewer than
        `overtaking` jobs have gone before the oldest."""

    def beat(self, job_id: str, worker: str, lease_seconds: float, progress: Progress) -> bool:
        """Renews a lease. False: the worker has the job no more, or it shall be cancelled."""

    def complete(self, job_id: str, worker: str, result: dict[str, Any]) -> bool:
        """Ends a job well. False: the worker has it no more, and its result is void."""

    def fail(self, job_id: str, worker: str, code: str, message: str) -> bool:
        """Ends a job badly. False as in `complete`."""

    def give_back(self, job_id: str, worker: str, counted: bool = False) -> bool:
        """Queues a job again whose run was interrupted by its worker's own end; the attempt does not count.

        With `counted` it does, and a job that was begun too often has failed instead.
        """

    def cancel(self, job_id: str) -> Job | None:
        """Ends a queued job as cancelled, and asks for the end of one in progress; others stay as they are."""

    def remove(self, job_id: str) -> bool:
        """Forgets a job in any state."""

    def expired(self, most_bytes: int) -> list[str]:
        """Finished jobs whose time is over, and the oldest of those whose files have more bytes altogether."""

    def ids(self) -> set[str]: ...
