"""`/v1/videos`: OpenAI's videos API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from ..errors import Refusal, not_found
from ..executor import Wanted
from ..files import THUMBNAIL
from ..jobs import CANCELLED
from .answers import Video, VideoDeleted, VideoList, poll_after_ms
from .bodies import VideoRequest
from .content import send_file
from .context import Context, context_of, owner_of
from .events import event_stream
from .reading import picture_in, read_body
from .schema import body_of, refusals

router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=refusals(401, 403))
The = Annotated[Context, Depends(context_of)]


@router.post(
    "",
    response_model=Video,
    responses=refusals(400, 404, 408, 409, 413, 415, 429),
    openapi_extra=body_of("VideoRequest", file="input_reference"),
)
async def create_video(
    request: Request,
    response: Response,
    context: The,
    idempotency_key: Annotated[str | None, Header(description="Twice the same key: one job.")] = None,
) -> Video:
    """Accepts a video to be made. It is kept from now on, whatever happens to the server."""
    body, upload = await read_body(request, VideoRequest, context.settings.limits)
    inside = picture_in(body.input_reference, context.settings.limits)
    if body.frames is not None and body.seconds is not None:
        raise Refusal("frames and seconds both say how long the video is: give one of them.", param="seconds")
    wanted = Wanted(
        prompt=body.prompt,
        wishes=body.granted(),
        seconds=body.seconds,
        preview=body.preview,
        picture=inside if upload is None else upload,
    )

    def submit() -> tuple[Video, int]:
        card = context.card(body.model, stills=False)
        job = context.submit(card.id, wanted, owner_of(request), idempotency_key)
        return context.video(job), poll_after_ms(job)

    video, pause = await run_in_threadpool(submit)
    request.state.job = video.id  # for the log
    response.headers["openai-poll-after-ms"] = str(pause)
    return video


@router.get("", response_model=VideoList, responses=refusals(400, 404))
def list_videos(
    context: The,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(description="The last video of the page before.")] = None,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
) -> VideoList:
    """Videos in the order in which they were accepted, the newest first."""
    if after is not None:
        context.job(after)
    try:
        jobs, more = context.store.page(limit, after, order == "desc")
    except KeyError:  # deleted meanwhile
        raise not_found(after or "") from None
    data = [context.video(job) for job in jobs]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return VideoList(data=data, first_id=first, last_id=last, has_more=more)


@router.get("/{video_id}", response_model=Video, responses=refusals(404))
def get_video(video_id: str, response: Response, context: The) -> Video:
    """One video."""
    job = context.job(video_id)
    response.headers["openai-poll-after-ms"] = str(poll_after_ms(job))
    return context.video(job)


@router.delete("/{video_id}", response_model=VideoDeleted, responses=refusals(404))
def delete_video(video_id: str, context: The) -> VideoDeleted:
    """Forgets a video and its files. One that is being made is stopped."""
    job = context.job(video_id)
    if not context.store.remove(job.id):
        raise not_found(video_id)
    context.executor.cancel(job.id)
    context.files.remove(job.id)
    return VideoDeleted(id=job.id)


@router.post("/{video_id}/cancel", response_model=Video, responses=refusals(404))
def cancel_video(video_id: str, context: The) -> Video:
    """Stops a video within a step, or takes it out of the queue. One that is over stays as it is."""
    job = context.store.cancel(context.job(video_id).id)
    if job is None:
        raise not_found(video_id)
    context.executor.cancel(job.id)
    return context.video(job)


@router.head("/{video_id}/content", include_in_schema=False)  # players ask for the length first
@router.get(
    "/{video_id}/content",
    response_class=Response,
    responses={
        200: {
            "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in ("video/mp4", "image/png")}
        },
        206: {"description": "A part of the file"},
        304: {"description": "The client has it already"},
        **refusals(400, 404, 409, 416),
    },
)
def get_content(
    video_id: str,
    request: Request,
    context: The,
    variant: Annotated[Literal["video", "thumbnail"], Query()] = "video",
) -> Response:
    """The file of a completed video (a PNG, for a model of stills), or a small picture of it."""
    job = context.job(video_id)
    if job.status == "failed":
        reason = "it was cancelled" if job.error_code == CANCELLED else "it failed"
        raise Refusal(f"this video has no content, because {reason}.", 404, job.error_code)
    if job.status != "completed":
        raise Refusal("this video is not ready: ask again when its status is completed.", 409, "not_ready")
    folder = context.files.folder(job.id)
    path, kind = (
        (folder / job.result["file"], job.result["type"]) if variant == "video" else (folder / THUMBNAIL, "image/png")
    )
    try:
        return send_file(path, kind, f"{job.result['sha256']}-{variant}", request.headers, f"{job.id}{path.suffix}")
    except FileNotFoundError:
        raise not_found(video_id) from None


_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events: status, progress, preview", "content": {"text/event-stream": {}}}
}


@router.get("/{video_id}/events", response_class=StreamingResponse, responses={**_EVENTS, **refusals(404, 429)})
async def get_events(
    video_id: str,
    context: The,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamingResponse:
    """What happens to a video, until it is over. Leaving does not stop it."""
    await run_in_threadpool(context.job, video_id)
    if context.executor.board.watchers() >= context.settings.limits.streams:
        raise Refusal(
            "too many clients watch already: ask for the video itself.", 429, "too_many_streams", retry_after=5
        )
    stream = event_stream(context, video_id, last_event_id)
    return StreamingResponse(stream, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
