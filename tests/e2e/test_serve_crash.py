"""Nothing that a server accepted is lost, however it ends."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import SERVE, Served, served, start

PROMPTS = ("a red circle moving right on a black background", "a blue star spinning on a gray background")
KILLS = 4


def short(seed: int) -> dict[str, Any]:
    return {"prompt": PROMPTS[seed % 2], "seed": seed, "frames": 5, "steps": 1}


def test_a_server_that_is_killed_at_random_points_loses_no_accepted_job(tmp_path: Path) -> None:
    chance = random.Random(7)
    data, accepted = tmp_path / "data", dict[str, int]()
    keys: dict[str, str] = {}
    for kill in range(KILLS):
        if kill == KILLS - 1:  # one that is killed while it starts
            with open(tmp_path / "starting.log", "wb") as out:
                starting = start(data, out, "--attempts", "100")
            time.sleep(chance.uniform(0.2, 1.5))
            starting.kill()
            starting.wait()
        with served(data, "--attempts", "100") as server:
            timer = threading.Timer(chance.uniform(0.02, 1.2), server.process.kill)
            timer.start()
            while server.process.poll() is None:
                seed = len(accepted) + 1
                try:
                    # A client that is not answered asks again with the same key.
                    found = server.ask("/v1/videos", short(seed), Idempotency_Key=f"k{seed}")
                except (urllib.error.URLError, OSError, ValueError):
                    continue
                accepted[found["id"]] = seed
                keys[f"k{seed}"] = found["id"]
                time.sleep(chance.uniform(0, 0.1) if kill else 0)
                if len(accepted) >= 4 * (kill + 1):
                    server.process.wait()
            timer.join()
    assert len(accepted) >= KILLS
    with served(data, "--attempts", "100") as server:
        for video in accepted:
            server.finished(video)
        assert {video["id"] for video in server.ask("/v1/videos?limit=100")["data"]} == set(accepted)
        for key, video in keys.items():
            assert server.ask("/v1/videos", short(accepted[video]), Idempotency_Key=key)["id"] == video
        first = next(iter(accepted))
        again = server.finished(server.ask("/v1/videos", short(accepted[first]))["id"])
        assert content(data, first) == content(data, again["id"])
    left = {path.name for path in (data / "videos").rglob("*") if path.is_file()}
    assert left == {"video.mp4", "thumbnail.png"}


def content(data: Path, video: str) -> bytes:
    return (data / "videos" / video / "video.mp4").read_bytes()


def test_a_result_whose_file_is_gone_is_made_again_and_a_job_that_kills_its_server_ends(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data) as server:
        video = server.ask("/v1/videos", short(1))["id"]
        server.finished(video)
        before = content(data, video)
        stop(server, signal.SIGTERM, 0)
    (data / "videos" / video / "video.mp4").unlink()
    with served(data, "--attempts", "1") as server:
        server.finished(video)
        assert content(data, video) == before
        long = server.ask("/v1/videos", {**short(2), "frames": 81, "size": "384x384"})["id"]
        server.until(long, lambda video: video["tmd"]["stage"] is not None)
    with served(data, "--attempts", "1") as server:
        ended = server.until(long, lambda video: video["status"] == "failed")
        assert ended["error"]["code"] == "attempts_exhausted"


def stop(server: Served, number: signal.Signals, code: int) -> None:
    server.process.send_signal(number)
    assert server.process.wait(30) == code, server.log.read_text()
    assert "Traceback" not in server.log.read_text()


def test_a_server_that_is_told_to_end_gives_its_job_back_in_the_stated_time(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with served(data, "--grace", "0") as server:
        second = subprocess.run([*SERVE, "--data", str(data), "--port", "0"], capture_output=True, text=True)
        assert second.returncode == 1 and "another tmd-serve uses the data folder" in second.stderr
        long = server.ask("/v1/videos", {**short(1), "frames": 81, "size": "384x384"})["id"]
        server.until(long, lambda video: video["tmd"]["stage"] is not None)
        begin = time.monotonic()
        stop(server, signal.SIGTERM, 0)
        assert time.monotonic() - begin < 15
    with served(data) as server:
        found = server.until(long, lambda video: video["status"] == "in_progress")
        assert found["tmd"]["attempt"] == 1
        server.ask(f"/v1/videos/{long}", method="DELETE")


def test_elsewhere_than_on_this_machine_every_request_needs_a_key(tmp_path: Path) -> None:
    data = tmp_path / "data"
    refused = subprocess.run([*SERVE, "--data", str(data), "--host", "0.0.0.0"], capture_output=True, text=True)
    assert refused.returncode == 2 and "tmd-serve keys add" in refused.stderr
    add = [*SERVE, "keys", "add", "laptop", "--data", str(data)]
    key = subprocess.run(add, capture_output=True, text=True, check=True).stdout.strip()
    assert subprocess.run(add, capture_output=True).returncode == 2
    with served(data, "--host", "0.0.0.0") as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.ask("/v1/models")
        right = {"Authorization": f"Bearer {key}"}
        assert server.ask("/v1/models", **right)["data"][0]["id"] == "tiny"
        subprocess.run([*SERVE, "keys", "remove", "laptop", "--data", str(data)], check=True)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.ask("/v1/models", **right)
        stop(server, signal.SIGINT, 0)
