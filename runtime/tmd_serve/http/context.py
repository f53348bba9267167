"""What the routes of one application share."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Request

from ..errors import Refusal, not_found
from ..executor import Executor, ModelCard, Wanted
from ..files import PICTURE, DataFolder
from ..jobs import JOB_ID, Job, JobStore, QueueFull, new_id
from ..settings import ServeSettings
from .answers import Video, video_of

_IDEMPOTENCY = re.compile(r"[\x21-\x7e]{1,200}")
_LONGEST_WAIT = 3600


@dataclass(frozen=True)
class Context:
    """The three objects of an application, and the files of its jobs. Its methods may take a moment: not for the event
    loop's thread."""

    store: JobStore
    executor: Executor
    settings: ServeSettings
    files: DataFolder

    def job(self, video: str) -> Job:
        """Raises Refusal for an id that there is not."""
        job = self.store.get(video) if JOB_ID.fullmatch(video) else None
        if job is None:
            raise not_found(video)
        return job

    def video(self, job: Job) -> Video:
        """Its object, as of now."""
        sight = self.executor.board.sight(job.id) if job.status == "in_progress" else None
        position = self.store.position(job) if job.status == "queued" else None
        return video_of(job, None if sight is None else sight.progress, position)

    def card(self, name: str | None, stills: bool) -> ModelCard:
        """The model of a request; without a name the first one, of those that make stills if `stills`."""
        cards = self.executor.models
        if name is None:
            fitting = [card for card in cards if card.makes_stills] if stills else cards
            if not fitting:
                raise Refusal("no model here makes stills: ask /v1/videos for a video.", param="model")
            return fitting[0]
        found = next((card for card in cards if card.id == name), None)
        if found is None:
            known = ", ".join(card.id for card in cards)
            shown = ascii(name if len(name) <= 60 else name[:60] + "...")
            raise Refusal(f"there is no model {shown} here: choose one of {known}.", 404, "model_not_found", "model")
        return found

    def submit(self, model: str, wanted: Wanted, owner: str, idempotency: str | None, index: int | None = None) -> Job:
        """Accepts a job: when this returns, it is kept. `index` counts the jobs of one request with one key.

        Raises Refusal, or tmd_runtime.UsageFailure.
        """
        if idempotency is not None and not _IDEMPOTENCY.fullmatch(idempotency):
            raise Refusal(
                "an Idempotency-Key has 1 to 200 characters of ASCII, without spaces.", param="Idempotency-Key"
            )
        most = self.settings.limits.waiting
        if idempotency is None and self.store.counts()["queued"] >= most:
            raise self._full()
        plan = self.executor.plan(model, wanted)
        job = Job(
            id=new_id(),
            model=model,
            request=plan.request,
            resolved=plan.resolved,
            group=plan.group,
            estimated_seconds=plan.seconds,
            owner=owner,
            # No client's key has a space in it, so this one is never another request's.
            idempotency_key=idempotency if idempotency is None or index is None else f"{idempotency} {index}",
            fingerprint=_fingerprint(model, wanted),
        )
        if wanted.picture is not None:
            try:
                self.files.write(job.id, PICTURE, wanted.picture)
            except OSError as error:
                self.files.remove(job.id)
                why = f"the server cannot keep the picture ({error.strerror})."
                raise Refusal(why, 503, "storage_failed", retry_after=60) from error
        kept: Job | None = None
        try:
            kept = self.store.add(job, most)
        except QueueFull:
            raise self._full() from None
        finally:
            if wanted.picture is not None and (kept is None or kept.id != job.id):
                self.files.remove(job.id)
        if kept.fingerprint != job.fingerprint:
            raise Refusal(
                "this Idempotency-Key was used for another request: choose a new one.",
                409,
                "idempotency_conflict",
                "Idempotency-Key",
            )
        self.executor.wake()
        return kept

    def _full(self) -> Refusal:
        count, seconds = self.store.waiting()
        wait = int(min(max(seconds / max(count, 1), 1), _LONGEST_WAIT))
        return Refusal(
            f"{self.settings.limits.waiting} jobs wait already, which is as many as this server lets wait: come again "
            f"in about {wait} s.",
            429,
            "queue_full",
            retry_after=wait,
        )


def _fingerprint(model: str, wanted: Wanted) -> str:
    """Equal for requests that ask for the same."""
    picture = None if wanted.picture is None else hashlib.sha256(wanted.picture).hexdigest()
    wishes: list[Any] = [wanted.prompt, sorted(wanted.wishes.items()), wanted.seconds, wanted.preview, picture]
    return hashlib.sha256(json.dumps([model, *wishes], default=list).encode()).hexdigest()


def context_of(request: Request) -> Context:
    return cast(Context, request.app.state.context)


def owner_of(request: Request) -> str:
    """The id of the API key that a request came with; empty where none is needed."""
    return str(getattr(request.state, "owner", ""))
