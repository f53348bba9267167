"""What the server answers, as the OpenAPI document shows it: OpenAI's objects, with ours under `tmd`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from ..jobs import Job, Progress

_POLL_SECONDS = (0.25, 5.0)
_QUEUED_PERCENT, _ALMOST_PERCENT = 0, 99


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error."""

    error: ErrorDetail


class VideoError(BaseModel):
    """Why a video failed. A cancelled one has the code `cancelled`."""

    code: str
    message: str


class Video(BaseModel):
    """OpenAI's video object. `tmd` holds the settings of the run and where it is."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    size: str
    seconds: str
    prompt: str
    remixed_from_video_id: str | None = None
    error: VideoError | None
    tmd: dict[str, Any]


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: bool = True


class ModelObject(BaseModel):
    """OpenAI's model object. `tmd` holds the options of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tmd"
    tmd: dict[str, Any]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ImageObject(BaseModel):
    b64_json: str
    revised_prompt: str | None = None
    tmd: dict[str, Any]


class ImageList(BaseModel):
    created: int
    output_format: Literal["png"] = "png"
    size: str
    data: list[ImageObject]


def video_of(job: Job, progress: Progress | None, position: int | None) -> Video:
    """The video object of a job; `progress` is fresher than the stored one, where it runs in this process."""
    shown = job.progress if progress is None else progress
    resolved, result = job.resolved, job.result
    percent = 100 if job.status == "completed" else min(int(shown.fraction * 100), _ALMOST_PERCENT)
    running = job.status == "in_progress"
    error = None if job.error_code is None else VideoError(code=job.error_code, message=job.error_message or "")
    return Video(
        id=job.id,
        model=job.model,
        status=job.status,
        progress=_QUEUED_PERCENT if job.status == "queued" else percent,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if job.expires_at is None else int(job.expires_at),
        size=f"{resolved['width']}x{resolved['height']}",
        seconds=f"{resolved['frames'] / resolved['fps']:g}",
        prompt=job.request["prompt"],
        error=error,
        tmd={
            **resolved,
            **{name: result[name] for name in ("steps", "times", "nfe", "warnings") if name in result},
            "stage": shown.stage if running else None,
            "step": shown.step if running else None,
            "of_steps": shown.of_steps if running else None,
            "eta_seconds": shown.eta_seconds if running else None,
            "estimated_seconds": job.estimated_seconds,
            "queue_position": position,
            "attempt": job.attempts,
            "stage_seconds": result.get("stage_seconds"),
            "total_seconds": result.get("total_seconds"),
            "content_type": result.get("type"),
            "bytes": result.get("bytes"),
        },
    )


def poll_after_ms(job: Job) -> int:
    """When it is worth to ask again, as OpenAI's clients read it from `openai-poll-after-ms`."""
    least, most = _POLL_SECONDS
    return int(1000 * min(max((job.estimated_seconds or 1.0) / 10, least), most))
