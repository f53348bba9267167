"""The files of jobs: one folder each, named by the job's id, below the data folder of a server.

Names come from ids that the server made, never from a request. A file appears under its name when it is complete and on
the disk.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from tmd_runtime import RuntimeFailure

from .jobs import JOB_ID

PICTURE = "picture"
THUMBNAIL, SHEET = "thumbnail.png", "spritesheet.png"


def unusable(path: Path, error: OSError) -> RuntimeFailure:
    """Why a server cannot begin on its data folder."""
    return RuntimeFailure(f"{path} of the data folder cannot be used ({error.strerror}): name another, --data DIR.")


class DataFolder:
    """The files below `root`, which is made if it is not there, for this user alone.

    Raises RuntimeFailure if it cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._videos = root / "videos"
        try:
            self._videos.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(self._videos, error) from error

    def folder(self, job_id: str) -> Path:
        """The folder of a job. Raises ValueError for what is not an id."""
        if not JOB_ID.fullmatch(job_id):
            raise ValueError(f"{job_id!r} is not the id of a job")
        return self._videos / job_id

    def make(self, job_id: str) -> Path:
        folder = self.folder(job_id)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def write(self, job_id: str, name: str, content: bytes) -> Path:
        """A small file, complete and on the disk when this returns."""
        path = self.make(job_id) / name
        temporary = path.with_name(f".{name}.part")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
        return path

    def seal(self, job_id: str) -> int:
        """Puts a job's files on the disk. Returns their bytes."""
        folder, total = self.folder(job_id), 0
        for path in folder.iterdir():
            total += path.stat().st_size
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(folder)
        sync_folder(self._videos)
        return total

    def remove(self, job_id: str) -> None:
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def sweep(self, known: set[str], older_than: float) -> int:
        """Removes folders of jobs that are not `known` and were last changed before the time `older_than`."""
        removed = 0
        for folder in self._videos.iterdir():
            with suppress(OSError):
                if JOB_ID.fullmatch(folder.name) and folder.name not in known and folder.stat().st_mtime < older_than:
                    shutil.rmtree(folder, ignore_errors=True)
                    removed += 1
        return removed


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
