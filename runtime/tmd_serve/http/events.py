"""The events of one video: what it is now, and what becomes of it.

An id is `REVISION.PROGRESS.PREVIEW`: how often the job's state, its progress and its preview have changed. A client
that comes back with the last id it saw gets what is newer; what lay between is in the newest.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool

from ..board import Sight
from ..jobs import Job, Progress
from .answers import video_of
from .context import Context

_LOOK_SECONDS = 1.0
"""How often the store is asked, for jobs that run on another machine."""
_ALIVE_LOOKS = 15
_ID = re.compile(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})")


async def event_stream(context: Context, job_id: str, last_id: str | None) -> AsyncIterator[bytes]:
    """Events of a job that exists, as bytes; ends after the final status, and when the server ends."""
    board = context.executor.board
    seen = _ID.fullmatch(last_id or "")
    revision, number, preview = map(int, seen.groups()) if seen else (-1, 0, 0)
    shown: Progress | None = None
    quiet = 0
    with board.watch(job_id) as bell:
        while not board.is_closed:
            job = await run_in_threadpool(context.store.get, job_id)
            if job is None:
                yield _event("deleted", f"{revision}.0.0", {"id": job_id, "deleted": True})
                return
            sight = board.sight(job_id) if job.status == "in_progress" else None
            if revision != job.revision or job.is_over:
                if revision != -1 and revision != job.revision:
                    number = preview = 0  # another attempt counts anew
                revision = job.revision
                video = await run_in_threadpool(context.video, job)
                yield _event("status", f"{revision}.{number}.{preview}", video.model_dump())
                quiet = 0
            if job.is_over:
                return
            if sight is not None and sight.number != number and sight.progress.stage:
                number, shown = sight.number, sight.progress
                yield _event("progress", f"{revision}.{number}.{preview}", _progress(job, sight.progress))
                quiet = 0
            elif sight is None and job.status == "in_progress" and job.progress not in (shown, Progress()):
                shown = job.progress
                yield _event("progress", f"{revision}.{number}.{preview}", _progress(job, shown))
            if sight is not None and sight.preview is not None and sight.preview_number != preview:
                preview = sight.preview_number
                yield _event("preview", f"{revision}.{number}.{preview}", _preview(sight))
            quiet += 1
            if quiet % _ALIVE_LOOKS == 0:
                yield b": still here\n\n"
            await bell.wait(_LOOK_SECONDS)


def _progress(job: Job, progress: Progress) -> dict[str, Any]:
    return {
        "id": job.id,
        "stage": progress.stage,
        "step": progress.step,
        "of_steps": progress.of_steps,
        "eta_seconds": progress.eta_seconds,
        "progress": video_of(job, progress, None).progress,
    }


def _preview(sight: Sight) -> dict[str, str]:
    return {"png": base64.b64encode(sight.preview or b"").decode()}


def _event(name: str, number: str, data: dict[str, Any]) -> bytes:
    return f"id: {number}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode()
