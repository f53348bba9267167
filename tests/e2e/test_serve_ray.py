"""The server on a Ray cluster of this machine: the bytes of `tmd-run`, and nothing lost when replicas are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.processes import wait_for

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")

PROMPT = "a red circle moving right on a black background"
LONG = {"prompt": PROMPT, "size": "128x128", "frames": 81, "seed": 7}
SHARE = {"cpus": 0.2}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    from ray import serve

    from tmd_serve.ray import build

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        words = {
            "data": str(tmp_path_factory.mktemp("data")),
            "bundles": "builtin:tiny,builtin:tim-tiny",
            "ingress": SHARE,
            "text_encoders": SHARE,
            "denoisers": "cpus=0.2,least=2,most=2",  # as on the command line of `serve run`
            "decoders": SHARE,
            "require_key": False,
        }
        serve.run(build(words), name="tmd", route_prefix="/")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as made:
            yield made
        serve.shutdown()
    finally:
        ray.shutdown()


def submit(client: httpx.Client, **body: Any) -> str:
    answer = client.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def video(client: httpx.Client, job: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/videos/{job}").json()
    return found


def is_over(client: httpx.Client, job: str) -> bool:
    return video(client, job)["status"] in ("completed", "failed")


def is_in(client: httpx.Client, job: str, *stages: str) -> bool:
    found = video(client, job)
    assert found["status"] != "failed", found
    return found["tmd"]["stage"] in stages


def replicas(name: str) -> list[int]:
    """Processes of a deployment, as Ray names them."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if words.startswith(f"ray::ServeReplica:tmd:{name}".encode()):
                found.append(int(folder.name))
    return found


def tmd_run(out: Path, *options: object) -> bytes:
    subprocess.run([sys.executable, "-m", "tmd_runtime", *map(str, options), "--quiet", "--out", str(out)], check=True)
    return out.read_bytes()


def test_videos_and_stills_have_the_bytes_of_tmd_run(client: httpx.Client, tmp_path: Path) -> None:
    jobs = [submit(client, prompt=PROMPT, seed=seed) for seed in (1, 2)]
    still = submit(client, prompt=PROMPT, seed=3, model="tim-tiny", steps=2)
    wait_for(lambda: all(is_over(client, job) for job in (*jobs, still)))
    for seed, job in zip((1, 2), jobs, strict=True):
        expected = tmd_run(tmp_path / f"{seed}.mp4", "--prompt", PROMPT, "--seed", seed)
        assert client.get(f"/v1/videos/{job}/content").content == expected
    tim = ("--bundle", "builtin:tim-tiny", "--prompt", PROMPT, "--seed", 3, "--steps", 2)
    assert client.get(f"/v1/videos/{still}/content").content == tmd_run(tmp_path / "3.png", *tim)
    stages = video(client, jobs[0])["tmd"]["stage_seconds"]
    assert {"text", "backbone", "flow_head", "decode", "file"} <= set(stages)


def test_a_cancelled_job_stops(client: httpx.Client) -> None:
    job = submit(client, **LONG)
    wait_for(lambda: is_in(client, job, "backbone", "flow_head", "decode"), seconds=60)
    client.post(f"/v1/videos/{job}/cancel")
    wait_for(lambda: is_over(client, job), seconds=20)
    assert video(client, job)["error"]["code"] == "cancelled"


@pytest.mark.parametrize(
    ("name", "stages"),
    [("Denoiser", ("backbone", "flow_head")), pytest.param("Decoder", ("decode",), marks=pytest.mark.slow)],
)
def test_a_job_whose_replicas_are_killed_runs_again(
    client: httpx.Client, tmp_path: Path, name: str, stages: tuple[str, ...]
) -> None:
    job = submit(client, **LONG)
    wait_for(lambda: is_in(client, job, *stages), seconds=60)
    killed = replicas(name)
    assert killed
    for process in killed:
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: is_over(client, job), seconds=180)
    found = video(client, job)
    assert (found["status"], found["tmd"]["attempt"]) == ("completed", 2)
    wishes = ("--prompt", PROMPT, "--size", "128x128", "--frames", 81, "--seed", 7)
    assert client.get(f"/v1/videos/{job}/content").content == tmd_run(tmp_path / "long.mp4", *wishes)
