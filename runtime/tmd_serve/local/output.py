"""The files of a finished run, and what is noted of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tmd_runtime.autoencoder.picture import fit
from tmd_runtime.files.png import png

from ..files import THUMBNAIL, DataFolder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tmd_runtime import Result

VIDEO, STILL = "video.mp4", "picture.png"
TYPES = {VIDEO: "video/mp4", STILL: "image/png"}
_THUMBNAIL_WIDTH, _PREVIEW_WIDTH = 320, 480


def preview(frames: NDArray[np.uint8]) -> bytes:
    """A PNG file of the middle one of frames uint8 `[F, H, W, 3]`, scaled down."""
    return png(_middle(frames, _PREVIEW_WIDTH))


def write_thumbnail(files: DataFolder, job_id: str, frames: NDArray[np.uint8]) -> None:
    """The middle one of the frames uint8 `[F, H, W, 3]`, scaled down."""
    files.write(job_id, THUMBNAIL, png(_middle(frames, _THUMBNAIL_WIDTH)))


def _middle(frames: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    frame = frames[len(frames) // 2]
    if frame.shape[1] <= width:
        return frame
    return fit(frame, width, max(round(frame.shape[0] * width / frame.shape[1]), 1))


def record(
    files: DataFolder, job_id: str, name: str, result: Result, warnings: Sequence[str], seconds: float
) -> dict[str, Any]:
    """`Job.result` of a run whose file `name` is written; puts the job's files on the disk."""
    path = files.folder(job_id) / name
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "file": name,
        "type": TYPES[name],
        "bytes": path.stat().st_size,
        "sha256": digest,
        "all_bytes": files.seal(job_id),
        "steps": result.steps,
        "times": list(result.times),
        "nfe": result.nfe,
        "memory": result.memory,
        "threads": result.threads,
        "stage_seconds": {stage: round(value, 6) for stage, value in result.stage_seconds.items()},
        "total_seconds": round(seconds, 6),
        "warnings": list(warnings),
    }
