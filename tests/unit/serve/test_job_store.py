"""What a store promises of its jobs, in SQLite and in a real PostgreSQL."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.helpers.serving import a_job
from tmd_serve.jobs import CANCELLED, Job, Progress, QueueFull, StoreFailure
from tmd_serve.store.database import Database, DatabaseFailure
from tmd_serve.store.sql_jobs import SqlJobs

RESULT = {"file": "video.mp4", "bytes": 10, "all_bytes": 12}


@pytest.fixture
def store(database: Database) -> SqlJobs:
    return SqlJobs(database, attempts=2, keep_seconds=60)


def add(store: SqlJobs, group: str = "group") -> Job:
    return store.add(a_job(group), 100)


def claimed(store: SqlJobs, worker: str = "w", lease: float = 60, group: str | None = None, overtaking: int = 2) -> Job:
    job = store.claim(worker, lease, group, overtaking)
    assert job is not None
    return job


def test_a_job_comes_back_as_it_was_accepted(store: SqlJobs) -> None:
    job = a_job()
    job.request["prompt"] = "nul \0, quotes '\", \U0001f3a5 and \u2028"
    kept = store.add(job, 100)
    assert kept == store.get(job.id)
    assert (kept.request, kept.resolved, kept.status, kept.attempts) == (job.request, job.resolved, "queued", 0)
    assert abs(kept.created_at - time.time()) < 60


def test_jobs_are_claimed_in_the_order_of_their_coming_and_once(store: SqlJobs) -> None:
    ids = [add(store).id for _ in range(3)]
    assert [claimed(store).id for _ in ids] == ids
    assert store.claim("w", 60, None, 0) is None


def test_claims_at_the_same_time_never_give_one_job_twice(store: SqlJobs) -> None:
    ids = {add(store).id for _ in range(12)}
    barrier, found = threading.Barrier(4), list[str]()

    def work(worker: int) -> None:
        barrier.wait()
        while (job := store.claim(f"w{worker}", 60, None, 0)) is not None:
            found.append(job.id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert Counter(found) == Counter(ids)


def test_jobs_of_the_loaded_group_go_first_a_bounded_number_of_times(store: SqlJobs) -> None:
    first = add(store, "a").id
    others = [add(store, "b").id for _ in range(3)]
    assert claimed(store, group="b").id == others[0]
    assert claimed(store, group="b").id == others[1]
    assert claimed(store, group="b").id == first
    assert claimed(store, group="b").id == others[2]


def test_a_full_queue_refuses_and_a_claim_makes_room(store: SqlJobs) -> None:
    for _ in range(2):
        store.add(a_job(), 2)
    with pytest.raises(QueueFull):
        store.add(a_job(), 2)
    claimed(store)
    store.add(a_job(), 2)
    assert store.waiting() == (3, 6.0)


def test_an_idempotency_key_gives_its_owner_the_same_job(store: SqlJobs) -> None:
    first = store.add(a_job(owner="me", idempotency_key="k"), 100)
    assert store.add(a_job(owner="me", idempotency_key="k"), 1).id == first.id
    assert store.add(a_job(owner="you", idempotency_key="k"), 100).id != first.id
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: store.add(a_job(owner="me", idempotency_key="race"), 100).id, range(8)))
    assert len(found) == 1


def test_a_lost_lease_is_claimed_again_and_its_worker_has_no_say_any_more(store: SqlJobs) -> None:
    add(store)
    job = claimed(store, "first", lease=0.0)
    again = claimed(store, "second")
    assert (again.id, again.attempts) == (job.id, 2)
    assert not store.beat(job.id, "first", 60, Progress())
    assert not store.complete(job.id, "first", RESULT)
    assert not store.fail(job.id, "first", "x", "x")
    assert not store.give_back(job.id, "first")
    assert store.complete(job.id, "second", RESULT)
    done = store.get(job.id)
    assert done is not None and (done.status, done.result) == ("completed", RESULT)


def test_a_beat_keeps_the_lease_and_tells_the_progress(store: SqlJobs) -> None:
    job = add(store)
    claimed(store, "w", lease=0.0)
    progress = Progress("decode", 2, 5, 0.4, 3.0)
    assert store.beat(job.id, "w", 60, progress)
    assert store.claim("other", 60, None, 0) is None
    seen = store.get(job.id)
    assert seen is not None and seen.progress == progress


def test_a_job_that_loses_its_worker_too_often_fails_with_the_reason(store: SqlJobs) -> None:
    job = add(store)
    for _ in range(2):
        claimed(store, lease=0.0)
    assert store.claim("w", 60, None, 0) is None
    failed = store.get(job.id)
    assert failed is not None and (failed.status, failed.error_code) == ("failed", "attempts_exhausted")
    assert "2 times" in (failed.error_message or "")


def test_a_job_that_is_given_back_has_lost_no_attempt(store: SqlJobs) -> None:
    job = add(store)
    for _ in range(5):
        assert claimed(store).attempts == 1
        assert store.give_back(job.id, "w")


def test_cancelling_ends_what_waits_and_asks_what_runs(store: SqlJobs) -> None:
    runs, waits = add(store), add(store)
    claimed(store)
    ended = store.cancel(waits.id)
    assert ended is not None and (ended.status, ended.error_code) == ("failed", CANCELLED)
    going = store.cancel(runs.id)
    assert going is not None and (going.status, going.cancelling) == ("in_progress", True)
    assert not store.beat(runs.id, "w", 60, Progress())
    assert store.complete(runs.id, "w", RESULT)
    done = store.cancel(runs.id)
    assert done is not None and done.status == "completed"
    assert store.cancel("video_" + "0" * 32) is None


def test_a_cancelled_job_whose_worker_vanished_does_not_run_again(store: SqlJobs) -> None:
    job = add(store)
    claimed(store, lease=0.0)
    store.cancel(job.id)
    assert store.claim("w", 60, None, 0) is None
    ended = store.get(job.id)
    assert ended is not None and ended.error_code == CANCELLED


def test_pages_follow_one_another_without_gaps_in_both_orders(store: SqlJobs) -> None:
    ids = [add(store).id for _ in range(5)]
    for newest_first, expected in ((True, ids[::-1]), (False, ids)):
        found: list[str] = []
        more, after = True, None
        while more:
            jobs, more = store.page(2, after, newest_first)
            found += [job.id for job in jobs]
            after = found[-1]
        assert found == expected
    with pytest.raises(KeyError):
        store.page(2, "video_" + "0" * 32, True)
    last = store.get(ids[4])
    assert last is not None and store.position(last) == 4


def test_what_is_too_old_or_too_much_expires_oldest_first(database: Database) -> None:
    store, short = SqlJobs(database), SqlJobs(database, keep_seconds=-1)
    ids = []
    for index in range(3):
        ids.append(add(store).id)
        claimed(store)
        assert (short if index == 1 else store).complete(ids[-1], "w", {**RESULT, "all_bytes": 100})
    waiting = add(store).id
    assert set(store.expired(1000)) == {ids[1]}
    assert set(store.expired(150)) == {ids[0], ids[1]}
    assert store.remove(ids[1]) and not store.remove(ids[1])
    assert store.ids() == {ids[0], ids[2], waiting}
    assert store.counts() == {"queued": 1, "in_progress": 0, "completed": 2, "failed": 0}


def test_a_newer_database_is_refused(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("UPDATE tmd_meta SET schema_version = 99"))
    with pytest.raises(DatabaseFailure, match="version 99"):
        Database(database.url)


def test_a_database_that_cannot_be_used_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite3"
    path.write_bytes(b"this is no database at all" * 100)
    with pytest.raises(DatabaseFailure, match="not a database"):
        Database.of_file(path)
    for url in ("mysql://x", "sqlite:////nowhere/at/all/x.sqlite3", "postgresql+psycopg://x@/x?host=/nowhere"):
        with pytest.raises(DatabaseFailure):
            Database(url)


def test_a_database_that_somebody_else_holds_is_a_store_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tmd_serve.store.database._BUSY_SECONDS", 0.05)
    first, second = (Database.of_file(tmp_path / "jobs.sqlite3") for _ in range(2))
    with first.write(), pytest.raises(StoreFailure, match="locked"):
        add(SqlJobs(second))
    add(SqlJobs(second))


def test_a_commit_in_sqlite_is_on_the_disk_and_in_the_log(tmp_path: Path) -> None:
    database = Database.of_file(tmp_path / "jobs.sqlite3")
    with database.read() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
