"""`tmd-serve` as its users meet it: OpenAI's own client, events, and the same bits as `tmd-run`."""

from __future__ import annotations

import base64
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from click.testing import CliRunner

from tests.helpers.serving import Served, served
from tmd_runtime.command.cli import command as tmd_run
from tmd_runtime.files.png import png
from tmd_serve.command.cli import command as tmd_serve

# OpenAI's own service for videos is to end; its client, and what others built on it, still speak this API.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

RED = "a red circle moving right on a black background"
SHORT = {"frames": 5, "steps": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("serve") / "data"
    with served(folder, "--bundle", "builtin:tiny", "--bundle", "stills=builtin:tim-tiny") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def made_by_tmd_run(folder: Path, *options: str) -> bytes:
    target = folder / f"out{'.png' if 'builtin:tim-tiny' in options else '.mp4'}"
    done = CliRunner().invoke(tmd_run, [*options, "--out", str(target), "--quiet"])
    assert done.exit_code == 0, done.output
    return target.read_bytes()


def test_openai_s_client_makes_polls_downloads_and_deletes_a_video(client: openai.OpenAI, tmp_path: Path) -> None:
    video = client.videos.create(prompt=RED, model="tiny", extra_body={"seed": 11})
    assert (video.object, video.model, video.size) == ("video", "tiny", "64x64")
    assert video.status in ("queued", "in_progress")
    done = client.videos.poll(video.id)
    assert (done.status, done.progress, done.error, done.seconds) == ("completed", 100, None, "2.125")
    content = client.videos.download_content(video.id).read()
    assert content == made_by_tmd_run(tmp_path, "--prompt", RED, "--seed", "11")
    small = client.videos.download_content(video.id, variant="thumbnail").read()
    assert small.startswith(b"\x89PNG")
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(video.id)


def test_openai_s_client_makes_and_polls_in_one_call_and_pages_through_the_list(client: openai.OpenAI) -> None:
    extra: dict[str, Any] = {"extra_body": SHORT}
    ids = [client.videos.create_and_poll(prompt=RED, size="64x64", **extra).id for _ in range(3)]  # type: ignore[arg-type]
    assert [video.id for video in client.videos.list(limit=2)][:3] == ids[::-1]
    first = client.videos.list(limit=1, order="desc")
    assert first.has_more and [video.id for video in first.get_next_page().data] == [ids[1]]


def test_openai_s_client_gets_errors_as_it_knows_them(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="choose a multiple of 16") as refused:
        client.videos.create(prompt=RED, size="63x64")  # type: ignore[arg-type]
    assert refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.videos.create(prompt=RED, model="sora-2")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")


def test_openai_s_client_generates_images_with_a_model_of_stills(client: openai.OpenAI, tmp_path: Path) -> None:
    prompt = "a large orange star on a black background"
    images = client.images.generate(prompt=prompt, n=2, response_format="b64_json", extra_body={"seed": 5})
    assert images.data is not None and len(images.data) == 2
    first, second = (base64.b64decode(image.b64_json or "") for image in images.data)
    assert first == made_by_tmd_run(tmp_path, "--bundle", "builtin:tim-tiny", "--prompt", prompt, "--seed", "5")
    assert second.startswith(b"\x89PNG") and second != first
    assert [model.id for model in client.models.list()] == ["tiny", "stills"]


def test_openai_s_client_starts_from_a_picture(client: openai.OpenAI, tmp_path: Path) -> None:
    picture = tmp_path / "start.png"
    picture.write_bytes(png(np.random.default_rng(1).integers(0, 255, (50, 70, 3), np.uint8)))
    wishes = {"strength": 0.5, "seed": 3, "steps": 4}
    video = client.videos.create_and_poll(
        prompt="a red circle", model="stills", input_reference=picture, extra_body=wishes
    )
    assert video.status == "completed"
    options = ("--bundle", "builtin:tim-tiny", "--prompt", "a red circle", "--image", str(picture))
    expected = made_by_tmd_run(tmp_path, *options, "--strength", "0.5", "--seed", "3", "--steps", "4")
    assert client.videos.download_content(video.id).read() == expected


def test_events_go_from_the_first_status_to_the_last_and_show_previews(server: Served) -> None:
    video = server.ask("/v1/videos", {"prompt": RED, "steps": 3, "preview": True})["id"]
    with urllib.request.urlopen(f"{server.url}/v1/videos/{video}/events", timeout=60) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        blocks = [block for block in stream.read().decode().split("\n\n") if block and not block.startswith(":")]
    events = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks]
    kinds = [event["event"] for event in events]
    assert kinds[0] == kinds[-1] == "status" and {"progress", "preview"} <= set(kinds)
    assert json.loads(events[-1]["data"])["status"] == "completed"
    shares = [json.loads(event["data"])["progress"] for event in events if event["event"] == "progress"]
    assert shares == sorted(shares) and len(shares) > 2


def test_a_client_that_goes_away_stops_nothing_and_a_cancel_stops_within_a_step(server: Served) -> None:
    long = server.ask("/v1/videos", {"prompt": RED, "steps": 4, "frames": 81, "size": "384x384"})["id"]
    after = server.ask("/v1/videos", {"prompt": RED, **SHORT})["id"]
    with urllib.request.urlopen(f"{server.url}/v1/videos/{long}/events", timeout=60) as stream:
        stream.readline()
    server.until(long, lambda video: video["tmd"]["stage"] is not None)
    assert server.ask(f"/v1/videos/{after}")["tmd"]["queue_position"] == 0
    begin = time.monotonic()
    server.ask(f"/v1/videos/{long}/cancel", method="POST")
    cancelled = server.until(long, lambda video: video["status"] != "in_progress")
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert time.monotonic() - begin < 10
    server.finished(after)


def test_the_documented_client_works_and_documented_options_exist(
    server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example is not None and "http://127.0.0.1:8000" in example[1]
    monkeypatch.chdir(tmp_path)
    exec(example[1].replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out == "completed 2.125\n"
    assert (tmp_path / "star.mp4").read_bytes()[4:8] == b"ftyp"
    known = {name for parameter in tmd_serve.params for name in parameter.opts}
    tables = [line for line in text.splitlines() if line.startswith("| `--") or "tmd-serve" in line]
    named = {name for line in tables for name in re.findall(r"(?<![\w-])--[a-z-]+", line.split("tmd-serve")[-1])}
    assert named >= {"--max-size", "--host", "--keep"} and named <= known | {"--read-only", "--tmpfs", "--build-arg"}


def test_what_a_server_says_of_itself(server: Served) -> None:
    assert server.ask("/healthz") == {"status": "ok"} and server.ask("/readyz") == {"status": "ready"}
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
    assert 'tmd_jobs_ended_total{model="tiny",outcome="completed"}' in text
    assert "tmd_loaded_models 2" in text
    lines = [line for line in server.log.read_text().splitlines() if not line.startswith("tmd-serve:")]
    assert lines and all(json.loads(line)["level"] in ("info", "warning") for line in lines)
