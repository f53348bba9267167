"""Servers for tests: an executor that runs nothing, applications in this process, and `tmd-serve` as a process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.helpers.processes import with_default_signals
from tmd_runtime import UsageFailure
from tmd_serve.board import Board
from tmd_serve.executor import ModelCard, Plan, Wanted
from tmd_serve.http.app import create_app
from tmd_serve.http.guard import Keys
from tmd_serve.jobs import Job, new_id
from tmd_serve.settings import Limits, ServeSettings
from tmd_serve.store.database import Database
from tmd_serve.store.sql_jobs import SqlJobs

SERVE = [sys.executable, "-m", "tmd_serve"]


class IdleExecutor:
    """An executor that accepts and runs nothing, with a model of videos and one of stills."""

    def __init__(self) -> None:
        self._board = Board()
        self.cancelled: list[str] = []
        self.planned: list[Wanted] = []

    @property
    def models(self) -> Sequence[ModelCard]:
        return [ModelCard("clips", 1, {"kind": "video"}), ModelCard("stills", 1, {"kind": "image"})]

    @property
    def board(self) -> Board:
        return self._board

    def plan(self, model: str, wanted: Wanted) -> Plan:
        self.planned.append(wanted)
        if not wanted.prompt.strip():
            raise UsageFailure("the prompt is empty: describe the video in a few words.")
        size = wanted.wishes.get("size", (64, 64))
        frames = wanted.wishes.get("frames", 17)
        resolved = {
            "width": size[0],
            "height": size[1],
            "frames": frames,
            "fps": wanted.wishes.get("fps", 8),
            "seed": 1,
        }
        request: dict[str, Any] = {
            "prompt": wanted.prompt,
            "wishes": {},
            "preview": wanted.preview,
            "picture": False,
        }
        return Plan(request, resolved, model, 2.0, 1000)

    def start(self) -> None: ...

    def wake(self) -> None: ...

    def cancel(self, job_id: str) -> None:
        self.cancelled.append(job_id)
        self._board.changed(job_id)

    def stop(self, grace_seconds: float) -> None: ...

    def is_ready(self) -> bool:
        return not self._board.is_closed

    def figures(self) -> dict[str, float]:
        return {"loaded_models": 0.0}


class Place:
    """An application over an idle executor, with its store, in one folder."""

    def __init__(self, folder: Path, keys: Keys | None = None, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.database = Database.of_file(folder / "jobs.sqlite3")
        self.store, self.executor = SqlJobs(self.database), IdleExecutor()
        self.settings = ServeSettings(folder, **{"limits": Limits(waiting=1000), **settings})
        self.app: FastAPI = create_app(self.store, self.executor, self.settings, keys)
        self.client = TestClient(self.app, base_url="http://localhost:8000", raise_server_exceptions=False)

    def finish(self, content: bytes = b"0123456789") -> str:
        """A completed job with this content; returns its id."""
        accepted = self.store.add(a_job(), 1000)
        job = self.store.claim("test", 60, None, 0)
        assert job is not None and job.id == accepted.id
        files = self.app.state.context.files
        files.write(job.id, "video.mp4", content)
        files.write(job.id, "thumbnail.png", b"png")
        size = len(content)
        result = {"file": "video.mp4", "type": "video/mp4", "bytes": size, "all_bytes": size + 3, "sha256": "ab"}
        assert self.store.complete(job.id, "test", result)
        return job.id


def a_job(group: str = "group", **fields: Any) -> Job:
    """A job as the application makes it."""
    request: dict[str, Any] = {"prompt": "a red circle", "wishes": {}, "preview": False, "picture": False}
    resolved = {"width": 64, "height": 64, "frames": 17, "fps": 8, "seed": 1}
    return Job(new_id(), "clips", request, resolved, group=group, estimated_seconds=2.0, **fields)


class Served:
    """A running `tmd-serve`. `url` is where it listens, `log` the file of what it says."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.url = self._wait()

    def _wait(self) -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            found = re.search(r"listening on (http://\S+)", self.log.read_text())
            if found:
                return found[1]
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)
        raise AssertionError(self.log.read_text())

    def ask(self, path: str, body: object = None, method: str | None = None, **headers: str) -> Any:
        """The JSON answer to a request; raises urllib's HTTPError, with the server's sentence, for an error."""
        data = None if body is None else json.dumps(body).encode()
        wanted = {
            "Content-Type": "application/json",
            **{name.replace("_", "-"): text for name, text in headers.items()},
        }
        request = urllib.request.Request(self.url + path, data, wanted, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            error.msg += f": {error.read().decode()}"
            raise

    def until(self, video: str, done: Callable[[Any], bool], seconds: float = 60.0) -> Any:
        """The video, once `done` holds for it."""
        end = time.monotonic() + seconds
        while True:
            found = self.ask(f"/v1/videos/{video}")
            if done(found):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.02)

    def finished(self, video: str) -> Any:
        """The video, completed."""
        found = self.until(video, lambda found: found["status"] in ("completed", "failed"))
        assert found["status"] == "completed", found
        return found


@contextmanager
def served(folder: Path, *options: str, log: str = "log") -> Iterator[Served]:
    """`tmd-serve` on a free port, with its data in `folder`; nothing of it is left behind the block."""
    with open(folder.parent / log, "wb") as out:
        process = start(folder, out, *options)
    try:
        yield Served(process, folder.parent / log)
    finally:
        process.kill()
        process.wait()


def start(folder: Path, out: IO[bytes], *options: str) -> subprocess.Popen[bytes]:
    command = [*SERVE, "--data", str(folder), "--port", "0", *options]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
    return subprocess.Popen(command, preexec_fn=with_default_signals, **pipes)
