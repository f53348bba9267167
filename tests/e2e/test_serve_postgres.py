"""Two servers that share one PostgreSQL database and one data folder: either one answers, and one takes over."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from tests.helpers.postgres import postgres
from tests.helpers.serving import Served, served

RED = "a red circle moving right on a black background"


def test_servers_share_jobs_and_one_takes_over_what_a_killed_one_ran(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with postgres() as url:
        options = ("--database", url, "--lease", "1", "--attempts", "10")
        with served(data, *options, log="first.log") as one, served(data, *options, log="second.log") as other:
            long = one.ask("/v1/videos", {"prompt": RED, "steps": 3, "frames": 21, "size": "256x256"})["id"]
            one.until(long, lambda video: video["tmd"]["stage"] is not None)
            busy, free = (one, other) if runs(one) else (other, one)
            # Accepted by the one that is busy, run by the other one, fetched from either.
            short = busy.ask("/v1/videos", {"prompt": RED, "steps": 1, "frames": 5})["id"]
            free.until(short, lambda video: video["status"] == "in_progress" or video["progress"] == 100)
            assert free.ask(f"/v1/videos/{long}")["status"] == "in_progress"
            busy.process.kill()
            free.finished(short)
            assert free.finished(long)["tmd"]["attempt"] == 2
            assert {video["id"] for video in free.ask("/v1/videos")["data"]} == {long, short}


def runs(server: Served) -> bool:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        return "tmd_running_jobs 1" in answer.read().decode()
