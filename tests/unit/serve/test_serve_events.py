"""The events of a video: what comes, in which order, and when they end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.helpers.serving import Place, a_job
from tmd_serve.http.events import event_stream
from tmd_serve.jobs import Progress

RESULT = {"file": "video.mp4", "type": "video/mp4", "bytes": 1, "all_bytes": 1, "sha256": "ab"}


class Reader:
    """Reads events one by one."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self.last = ""

    async def next(self) -> tuple[str, Any]:
        text = (await asyncio.wait_for(anext(self._stream), 5)).decode()
        lines = dict(line.split(": ", 1) for line in text.strip().split("\n"))
        self.last = lines["id"]
        return lines["event"], json.loads(lines["data"])

    async def is_over(self) -> bool:
        return [text async for text in self._stream] == []


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_serve.http.events._LOOK_SECONDS", 0.05)


def test_events_tell_a_job_from_the_queue_to_its_end(place: Place) -> None:
    store, board = place.store, place.executor.board
    job = store.add(a_job(), 10)

    async def watch() -> None:
        reader = Reader(event_stream(place.app.state.context, job.id, None))
        kind, video = await reader.next()
        assert (kind, video["status"], video["tmd"]["queue_position"]) == ("status", "queued", 0)
        store.claim("w", 60, None, 0)
        board.changed(job.id)
        kind, video = await reader.next()
        assert (kind, video["status"]) == ("status", "in_progress")
        board.show(job.id, Progress("backbone", 1, 2, 0.25, 3.5))
        kind, progress = await reader.next()
        expected = {"id": job.id, "stage": "backbone", "step": 1, "of_steps": 2, "eta_seconds": 3.5, "progress": 25}
        assert (kind, progress) == ("progress", expected)
        board.show_preview(job.id, b"png")
        assert await reader.next() == ("preview", {"png": "cG5n"})
        store.complete(job.id, "w", RESULT)
        board.clear(job.id)
        kind, video = await reader.next()
        assert (kind, video["status"], video["progress"]) == ("status", "completed", 100)
        assert await reader.is_over()

    asyncio.run(watch())
    assert board.watchers() == 0


def test_a_client_that_comes_back_gets_what_is_newer(place: Place) -> None:
    store, board = place.store, place.executor.board
    job = store.add(a_job(), 10)
    store.claim("w", 60, None, 0)
    board.show(job.id, Progress("backbone", 1, 2, 0.25))

    async def watch() -> None:
        context = place.app.state.context
        first = Reader(event_stream(context, job.id, None))
        await first.next()
        await first.next()
        board.show(job.id, Progress("backbone", 2, 2, 0.5))
        again = Reader(event_stream(context, job.id, first.last))
        kind, progress = await again.next()
        assert (kind, progress["step"]) == ("progress", 2)
        store.complete(job.id, "w", RESULT)
        board.clear(job.id)
        assert (await again.next())[0] == "status"
        late = Reader(event_stream(context, job.id, again.last))  # the end is told again, or nobody would know
        kind, video = await late.next()
        assert (kind, video["status"]) == ("status", "completed") and await late.is_over()
        for strange in ("x", "1.2", "9" * 40, "-1.0.0"):
            assert (await Reader(event_stream(context, job.id, strange)).next())[0] == "status"

    asyncio.run(watch())


def test_progress_of_a_job_on_another_machine_comes_from_the_store(place: Place) -> None:
    job = place.store.add(a_job(), 10)
    place.store.claim("far", 60, None, 0)

    async def watch() -> None:
        reader = Reader(event_stream(place.app.state.context, job.id, None))
        await reader.next()
        place.store.beat(job.id, "far", 60, Progress("decode", 1, 5, 0.8))
        kind, progress = await reader.next()
        assert (kind, progress["stage"], progress["progress"]) == ("progress", "decode", 80)

    asyncio.run(watch())


def test_events_end_with_a_deleted_job_and_with_the_server(place: Place) -> None:
    deleted, left = (place.store.add(a_job(), 10) for _ in range(2))

    async def watch() -> None:
        context = place.app.state.context
        first, second = (Reader(event_stream(context, job.id, None)) for job in (deleted, left))
        await first.next()
        await second.next()
        place.store.remove(deleted.id)
        assert (await first.next())[0] == "deleted"
        assert await first.is_over()
        place.executor.board.close()
        assert await second.is_over()

    asyncio.run(watch())


def test_streams_are_bounded(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job = place.store.add(a_job(), 10)
    monkeypatch.setattr(place.executor.board, "watchers", lambda: place.settings.limits.streams)
    answer = place.client.get(f"/v1/videos/{job.id}/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_streams")
