"""Progress of the runs in this process, for whoever watches: kept in memory, gone with the process.

A worker thread writes; event streams wait in the event loop. What must survive is in the store.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from .jobs import Progress


@dataclass(frozen=True)
class Sight:
    """What is known of a running job: its progress, the latest preview as a PNG file, and how often each changed."""

    progress: Progress
    number: int = 0
    preview: bytes | None = None
    preview_number: int = 0


class Bell:
    """Rings in the event loop of one watcher."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()

    def ring(self) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self, seconds: float) -> None:
        """Until it rings, or so long."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._event.wait(), seconds)
        self._event.clear()


class Board:
    """The sights of all running jobs, and the bells of their watchers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sights: dict[str, Sight] = {}
        self._bells: dict[str, set[Bell]] = {}
        self.is_closed = False

    def sight(self, job_id: str) -> Sight | None:
        return self._sights.get(job_id)

    def show(self, job_id: str, progress: Progress) -> None:
        with self._lock:
            before = self._sights.get(job_id, Sight(progress))
            self._sights[job_id] = replace(before, progress=progress, number=before.number + 1)
        self.changed(job_id)

    def show_preview(self, job_id: str, png: bytes) -> None:
        with self._lock:
            before = self._sights.get(job_id, Sight(Progress()))
            self._sights[job_id] = replace(before, preview=png, preview_number=before.preview_number + 1)
        self.changed(job_id)

    def clear(self, job_id: str) -> None:
        """The job runs here no more."""
        with self._lock:
            self._sights.pop(job_id, None)
        self.changed(job_id)

    def changed(self, job_id: str) -> None:
        """Something of a job is new: here or in the store."""
        with self._lock:
            bells = list(self._bells.get(job_id, ()))
        for bell in bells:
            bell.ring()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[Bell]:
        """A bell that rings when something of the job changes. In an event loop."""
        bell = Bell()
        with self._lock:
            self._bells.setdefault(job_id, set()).add(bell)
        try:
            yield bell
        finally:
            with self._lock:
                bells = self._bells[job_id]
                bells.discard(bell)
                if not bells:
                    del self._bells[job_id]

    def watchers(self) -> int:
        with self._lock:
            return sum(map(len, self._bells.values()))

    def close(self) -> None:
        """The server ends: whoever watches shall go."""
        self.is_closed = True
        with self._lock:
            bells = [bell for every in self._bells.values() for bell in every]
        for bell in bells:
            bell.ring()
