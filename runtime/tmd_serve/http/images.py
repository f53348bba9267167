"""`/v1/images/generations`: OpenAI's images API, for models of stills. The pictures are jobs like any other, and the
answer comes when they are done."""

from __future__ import annotations

import base64
from dataclasses import replace
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from starlette.concurrency import run_in_threadpool

from tmd_runtime.settings import MAX_SEED

from ..errors import Refusal
from ..executor import Wanted
from ..jobs import Job
from .answers import ImageList, ImageObject
from .bodies import ImageRequest
from .context import Context, context_of, owner_of
from .reading import read_body
from .schema import body_of, refusals

router = APIRouter(prefix="/v1/images", tags=["images"], responses=refusals(401, 403))
The = Annotated[Context, Depends(context_of)]
_LOOK_SECONDS = 1.0


@router.post(
    "/generations",
    response_model=ImageList,
    responses=refusals(400, 404, 408, 409, 413, 415, 429, 500, 503),
    openapi_extra=body_of("ImageRequest"),
)
async def create_images(
    request: Request,
    context: The,
    idempotency_key: Annotated[str | None, Header(description="Twice the same key: the same pictures.")] = None,
) -> ImageList:
    """Makes stills and answers with them. With a seed, picture k of n has the seed + k."""
    body, _ = await read_body(request, ImageRequest, context.settings.limits)
    card = context.card(body.model, stills=True)
    if not card.makes_stills:
        raise Refusal(f"the model {card.id} makes videos: ask /v1/videos.", param="model")
    count = body.n or 1
    jobs: list[Job] = []
    try:
        for index in range(count):
            wanted = Wanted(prompt=body.prompt, wishes=body.granted())
            if body.seed is not None and index:
                wanted = replace(wanted, wishes={**wanted.wishes, "seed": (body.seed + index) % (MAX_SEED + 1)})
            submit = partial(context.submit, card.id, wanted, owner_of(request), idempotency_key, index)
            jobs.append(await run_in_threadpool(submit))
    except BaseException:
        for job in jobs if idempotency_key is None else []:  # all or none; those of a key may be older
            await run_in_threadpool(_drop, context, job)
        raise
    done = [await _wait(request, context, job) for job in jobs]
    data = [await run_in_threadpool(_picture, context, job) for job in done]
    first = done[0].resolved
    return ImageList(created=int(done[0].created_at), size=f"{first['width']}x{first['height']}", data=data)


def _drop(context: Context, job: Job) -> None:
    if context.store.remove(job.id):
        context.executor.cancel(job.id)
        context.files.remove(job.id)


async def _wait(request: Request, context: Context, job: Job) -> Job:
    """The job when it is over. Raises Refusal if it fails, or if the server ends before it."""
    board = context.executor.board
    with board.watch(job.id) as bell:
        while not board.is_closed:
            found = await run_in_threadpool(context.store.get, job.id)
            if found is None:
                raise Refusal("the picture was deleted before it was done.", 409, "deleted")
            if found.status == "completed":
                return found
            if found.status == "failed":
                status = 409 if found.error_code == "cancelled" else 500
                raise Refusal(found.error_message or "the run failed.", status, found.error_code)
            if await request.is_disconnected():
                break
            await bell.wait(_LOOK_SECONDS)
    raise Refusal(f"the server ends; the picture will be at /v1/videos/{job.id}.", 503, "ending", retry_after=10)


def _picture(context: Context, job: Job) -> ImageObject:
    path = context.files.folder(job.id) / job.result["file"]
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Refusal("the picture was deleted before it was sent.", 409, "deleted") from None
    return ImageObject(b64_json=base64.b64encode(content).decode(), tmd=context.video(job).tmd | {"video_id": job.id})
