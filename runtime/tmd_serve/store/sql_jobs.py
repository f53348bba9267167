"""Jobs in a database.

A claim takes the row with `SELECT ... FOR UPDATE SKIP LOCKED` where there are several writers (PostgreSQL); SQLite has
one at a time. From then on the lease counts: until it runs out nobody else takes the job, and a worker that has lost it
can change nothing of it.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from ..jobs import CANCELLED, STATUSES, Job, Progress, QueueFull, Status
from .database import Database
from .tables import JOBS

_COLUMNS = [JOBS.c[field.name] for field in fields(Job)]
_ENDED = ("completed", "failed")


class SqlJobs:
    """A `JobStore` in a database. `attempts` bounds how often a job is begun whose worker vanished."""

    def __init__(self, database: Database, attempts: int = 3, keep_seconds: float = 7 * 86400.0) -> None:
        self._database, self._attempts, self._keep = database, attempts, keep_seconds

    def recover(self) -> int:
        """At the start of a server that alone uses the database: whatever was running can be claimed at once."""
        with self._database.write() as connection:
            lost = update(JOBS).where(JOBS.c.status == "in_progress").values(lease_until=0.0)
            return connection.execute(lost).rowcount

    def add(self, job: Job, most_waiting: int) -> Job:
        """See `JobStore.add`."""
        try:
            with self._database.write() as connection:
                same = self._same(connection, job)
                if same is not None:
                    return same
                waiting = select(func.count()).select_from(JOBS).where(JOBS.c.status == "queued")
                if connection.execute(waiting).scalar_one() >= most_waiting:
                    raise QueueFull
                row = {field.name: getattr(job, field.name) for field in fields(Job)}
                row |= {"progress": asdict(job.progress), "created_at": self._database.now(connection), "bytes": 0}
                row["overtaken"] = 0
                connection.execute(insert(JOBS).values(row))
                return _one(connection, job.id) or job
        except IntegrityError:
            # Another server accepted the same key at the same moment.
            with self._database.read() as connection:
                same = self._same(connection, job)
            if same is None:
                raise
            return same

    def _same(self, connection: Connection, job: Job) -> Job | None:
        if job.idempotency_key is None:
            return None
        mine = and_(JOBS.c.owner == job.owner, JOBS.c.idempotency_key == job.idempotency_key)
        row = connection.execute(select(*_COLUMNS).where(mine)).first()
        return None if row is None else _job(row)

    def get(self, job_id: str) -> Job | None:
        with self._database.read() as connection:
            return _one(connection, job_id)

    def page(self, limit: int, after: str | None, newest_first: bool) -> tuple[list[Job], bool]:
        """See `JobStore.page`."""
        query = select(*_COLUMNS).order_by(JOBS.c.number.desc() if newest_first else JOBS.c.number).limit(limit + 1)
        with self._database.read() as connection:
            if after is not None:
                number = connection.execute(select(JOBS.c.number).where(JOBS.c.id == after)).scalar()
                if number is None:
                    raise KeyError(after)
                query = query.where(JOBS.c.number < number if newest_first else JOBS.c.number > number)
            rows = connection.execute(query).all()
        return [_job(row) for row in rows[:limit]], len(rows) > limit

    def position(self, job: Job) -> int:
        """See `JobStore.position`."""
        number = select(JOBS.c.number).where(JOBS.c.id == job.id).scalar_subquery()
        before = select(func.count()).select_from(JOBS).where(JOBS.c.status == "queued", JOBS.c.number < number)
        with self._database.read() as connection:
            return int(connection.execute(before).scalar_one())

    def waiting(self) -> tuple[int, float]:
        """See `JobStore.waiting`."""
        total = select(func.count(), func.coalesce(func.sum(JOBS.c.estimated_seconds), 0.0))
        with self._database.read() as connection:
            count, seconds = connection.execute(total.where(JOBS.c.status.not_in(_ENDED))).one()
        return int(count), float(seconds)

    def counts(self) -> dict[Status, int]:
        """See `JobStore.counts`."""
        with self._database.read() as connection:
            rows = connection.execute(select(JOBS.c.status, func.count()).group_by(JOBS.c.status)).all()
        found = {status: int(count) for status, count in rows}
        return {status: found.get(status, 0) for status in STATUSES}

    def claim(self, worker: str, lease_seconds: float, group: str | None, overtaking: int) -> Job | None:
        """See `JobStore.claim`."""
        with self._database.write() as connection:
            now = self._database.now(connection)
            self._end_lost(connection, now)
            free = or_(JOBS.c.status == "queued", _lost(now))
            number = _choose(connection, free, group, overtaking)
            if number is None:
                return None
            taken = update(JOBS).where(JOBS.c.number == number)
            connection.execute(
                taken.values(
                    status="in_progress",
                    worker=worker,
                    lease_until=now + lease_seconds,
                    started_at=now,
                    attempts=JOBS.c.attempts + 1,
                    revision=JOBS.c.revision + 1,
                    progress=asdict(Progress()),
                )
            )
            return _job(connection.execute(select(*_COLUMNS).where(JOBS.c.number == number)).one())

    def _end_lost(self, connection: Connection, now: float) -> None:
        """Ends jobs that lost their worker too often, or while they were being cancelled."""
        ends: tuple[tuple[ColumnElement[bool], str, str], ...] = (
            (JOBS.c.cancelling.is_(True), CANCELLED, "the job was cancelled."),
            (
                JOBS.c.attempts >= self._attempts,
                "attempts_exhausted",
                f"the server ended {self._attempts} times while it ran this job, which may need more memory than there "
                "is: choose fewer frames or a smaller size, and look into the server's log.",
            ),
        )
        for condition, code, message in ends:
            over = update(JOBS).where(_lost(now), condition)
            connection.execute(over.values(**_ended("failed", now, self._keep, code, message)))

    def beat(self, job_id: str, worker: str, lease_seconds: float, progress: Progress) -> bool:
        """See `JobStore.beat`."""
        with self._database.write() as connection:
            lease = self._database.now(connection) + lease_seconds
            row = update(JOBS).where(_held(job_id, worker), JOBS.c.cancelling.is_(False))
            return connection.execute(row.values(lease_until=lease, progress=asdict(progress))).rowcount == 1

    def complete(self, job_id: str, worker: str, result: dict[str, Any]) -> bool:
        """See `JobStore.complete`."""
        with self._database.write() as connection:
            values = _ended("completed", self._database.now(connection), self._keep)
            row = update(JOBS).where(_held(job_id, worker))
            return connection.execute(row.values(**values, result=result, bytes=result["all_bytes"])).rowcount == 1

    def fail(self, job_id: str, worker: str, code: str, message: str) -> bool:
        """See `JobStore.fail`."""
        with self._database.write() as connection:
            values = _ended("failed", self._database.now(connection), self._keep, code, message)
            return connection.execute(update(JOBS).where(_held(job_id, worker)).values(**values)).rowcount == 1

    def give_back(self, job_id: str, worker: str, counted: bool = False) -> bool:
        """See `JobStore.give_back`."""
        if counted:
            # As if the lease had run out: the next claim takes it, or ends it.
            with self._database.write() as connection:
                lost = update(JOBS).where(_held(job_id, worker)).values(lease_until=0.0)
                return connection.execute(lost).rowcount == 1
        again = {
            "status": "queued", "worker": None, "lease_until": None, "started_at": None,
            "attempts": JOBS.c.attempts - 1, "revision": JOBS.c.revision + 1, "progress": asdict(Progress()),
        }  # fmt: skip
        with self._database.write() as connection:
            return connection.execute(update(JOBS).where(_held(job_id, worker)).values(again)).rowcount == 1

    def cancel(self, job_id: str) -> Job | None:
        """See `JobStore.cancel`."""
        with self._database.write() as connection:
            mine = update(JOBS).where(JOBS.c.id == job_id)
            values = _ended("failed", self._database.now(connection), self._keep, CANCELLED, "the job was cancelled.")
            connection.execute(mine.where(JOBS.c.status == "queued").values(**values))
            connection.execute(mine.where(JOBS.c.status == "in_progress").values(cancelling=True))
            return _one(connection, job_id)

    def restart(self, job_id: str) -> None:
        """Queues a completed job again whose files are gone."""
        gone = update(JOBS).where(JOBS.c.id == job_id, JOBS.c.status == "completed")
        again = {"status": "queued", "attempts": 0, "completed_at": None, "expires_at": None, "result": {}, "bytes": 0}
        with self._database.write() as connection:
            connection.execute(gone.values(again | {"revision": JOBS.c.revision + 1}))

    def remove(self, job_id: str) -> bool:
        """See `JobStore.remove`."""
        with self._database.write() as connection:
            return connection.execute(delete(JOBS).where(JOBS.c.id == job_id)).rowcount == 1

    def expired(self, most_bytes: int) -> list[str]:
        """See `JobStore.expired`."""
        ended = select(JOBS.c.id, JOBS.c.bytes, JOBS.c.expires_at).where(JOBS.c.status.in_(_ENDED))
        with self._database.read() as connection:
            now = self._database.now(connection)
            rows = connection.execute(ended.order_by(JOBS.c.completed_at.desc())).all()
        found, total = [], 0
        for row in rows:
            total += row.bytes
            if (row.expires_at is not None and row.expires_at < now) or total > most_bytes:
                found.append(row.id)
        return found

    def completed(self) -> list[Job]:
        with self._database.read() as connection:
            rows = connection.execute(select(*_COLUMNS).where(JOBS.c.status == "completed")).all()
        return [_job(row) for row in rows]

    def ids(self) -> set[str]:
        with self._database.read() as connection:
            return set(connection.execute(select(JOBS.c.id)).scalars())


def _lost(now: float) -> ColumnElement[bool]:
    return and_(JOBS.c.status == "in_progress", JOBS.c.lease_until < now)


def _held(job_id: str, worker: str) -> ColumnElement[bool]:
    return and_(JOBS.c.id == job_id, JOBS.c.worker == worker, JOBS.c.status == "in_progress")


def _ended(
    status: Status, now: float, keep_seconds: float, code: str | None = None, message: str | None = None
) -> dict[str, Any]:
    return {
        "status": status, "completed_at": now, "expires_at": now + keep_seconds, "error_code": code,
        "error_message": message, "worker": None, "lease_until": None, "revision": JOBS.c.revision + 1,
    }  # fmt: skip


def _choose(connection: Connection, free: ColumnElement[bool], group: str | None, overtaking: int) -> int | None:
    """The number of the job that comes next; see `JobStore.claim`. Nobody else gets it in this transaction."""
    query = select(JOBS.c.number, JOBS.c.group, JOBS.c.overtaken).where(free).order_by(JOBS.c.number).limit(1)
    query = query.with_for_update(skip_locked=True)
    oldest = connection.execute(query).first()
    if oldest is None:
        return None
    if group is not None and oldest.group != group and oldest.overtaken < overtaking:
        same = connection.execute(query.where(JOBS.c.group == group)).first()
        if same is not None:
            passed = update(JOBS).where(JOBS.c.number == oldest.number)
            connection.execute(passed.values(overtaken=JOBS.c.overtaken + 1))
            return int(same.number)
    return int(oldest.number)


def _one(connection: Connection, job_id: str) -> Job | None:
    row = connection.execute(select(*_COLUMNS).where(JOBS.c.id == job_id)).first()
    return None if row is None else _job(row)


def _job(row: Any) -> Job:
    values = dict(row._mapping)
    return Job(**{**values, "progress": Progress(**values["progress"])})
