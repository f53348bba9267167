"""Who may ask, from where, with how much."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import ExitStack
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from tests.helpers.serving import Place
from tmd_serve.errors import Refusal
from tmd_serve.http.intake import Intake
from tmd_serve.logs import JsonLines
from tmd_serve.settings import Limits
from tmd_serve.store.database import Database
from tmd_serve.store.sql_keys import SqlKeys


def test_other_names_for_this_machine_are_refused(place: Place) -> None:
    for host in ("localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "LOCALHOST"):
        assert place.client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "[::2]:80"):
        answer = place.client.get("/v1/models", headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host_not_allowed"), host


def test_pages_of_other_places_are_refused_even_where_no_script_reads_the_answer(place: Place) -> None:
    form = {"prompt": "x"}
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = place.client.post("/v1/videos", headers=headers, data=form)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    same = {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert place.client.post("/v1/videos", headers=same, data=form).status_code == 200
    assert place.store.counts()["queued"] == 1


def test_cors_is_off_unless_an_origin_is_named(tmp_path: Path) -> None:
    closed, opened = Place(tmp_path / "a"), Place(tmp_path / "b", origins=frozenset({"https://page.example"}))
    ask = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in closed.client.options("/v1/videos", headers=ask).headers
    allowed = opened.client.options("/v1/videos", headers=ask)
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert opened.client.get("/v1/models", headers={"Origin": "https://page.example"}).status_code == 200
    assert opened.client.get("/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_key_is_needed_below_a_prefix_as_well(tmp_path: Path) -> None:
    place = Place(tmp_path, SqlKeys(Database.of_file(tmp_path / "keys.sqlite3")), needs_key=True, hosts=None)
    below = TestClient(place.app, base_url="http://localhost:8000", root_path="/tmd")
    for path in ("/tmd/v1/models", "/tmd/metrics", "/v1/models", "/metrics"):
        assert below.get(path).status_code == 401, path
    assert below.get("/tmd/healthz").status_code == 200


def test_a_key_opens_and_is_kept_as_a_hash_alone(tmp_path: Path) -> None:
    keys = SqlKeys(Database.of_file(tmp_path / "keys.sqlite3"))
    key = keys.add("laptop")
    place = Place(tmp_path, keys, needs_key=True, hosts=None)
    for authorization in ("", "Bearer", "Bearer ", f"Basic {key}", f"Bearer {key}x", "Bearer \u00e4"):
        answer = place.client.get("/v1/models", headers={b"Authorization": authorization.encode("latin-1")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), authorization
        assert answer.headers["www-authenticate"] == "Bearer"
    right = {"Authorization": f"Bearer {key}"}
    assert place.client.get("/v1/models", headers=right).status_code == 200
    for path, status in (("/metrics", 401), ("/v1/nothing", 401), ("/healthz", 200), ("/openapi.json", 200)):
        assert place.client.get(path).status_code == status, path
    content = b"".join(path.read_bytes() for path in tmp_path.glob("keys.sqlite3*"))
    assert key.removeprefix("tmd-").encode() not in content and b"laptop" in content
    assert keys.remove("laptop")
    assert place.client.get("/v1/models", headers=right).status_code == 401


def test_one_name_is_one_key(tmp_path: Path) -> None:
    keys = SqlKeys(Database.of_file(tmp_path / "keys.sqlite3"))
    first = keys.add("a")
    with pytest.raises(ValueError, match="already"):
        keys.add("a")
    assert keys.add("b") != first
    assert [key.name for key in keys.list()] == ["a", "b"]
    assert not keys.remove("c")


def test_a_body_is_bounded_whatever_its_header_says(tmp_path: Path) -> None:
    place = Place(tmp_path, limits=Limits(upload_bytes=1000))
    large = b"x" * 300_000
    for body in (large, (part for part in [large[:200_000], large])):  # with its length, and in pieces without
        answer = place.client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    upload = place.client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": b"y" * 1001})
    assert (upload.status_code, upload.json()["error"]["param"]) == (413, "input_reference")
    assert place.store.counts()["queued"] == 0


def test_bodies_are_bounded_together_and_each_in_its_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_serve.http.intake._PAUSE_SECONDS", 0.05)
    intake = Intake(100)

    async def part() -> Message:
        return {"type": "http.request", "body": b"x" * 90, "more_body": True}

    async def silence() -> Message:
        await asyncio.sleep(5)
        return await part()

    async def receive() -> None:
        with ExitStack() as others:
            for _ in range(8):
                await others.enter_context(intake.open(part))()
            with intake.open(part) as ninth, pytest.raises(Refusal, match="too many large requests"):
                await ninth()
        with intake.open(part) as alone:
            await alone()
        with intake.open(silence) as slow, pytest.raises(Refusal, match="nothing of the request's body came"):
            await slow()

    asyncio.run(receive())


def test_answers_carry_the_request_id_and_are_not_sniffed(place: Place) -> None:
    given = place.client.get("/healthz", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    for strange in ("a b", "x" * 65, "\u00e4"):
        made = place.client.get("/nothing", headers={b"X-Request-ID": strange.encode("latin-1")})
        assert made.headers["x-request-id"] != strange and len(made.headers["x-request-id"]) == 16
        assert made.headers["x-content-type-options"] == "nosniff"


def test_the_log_has_a_line_of_json_per_request_and_no_prompt(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tmd_serve")
    made = place.client.post("/v1/videos", json={"prompt": "a secret wish"}, headers={"X-Request-ID": "r1"}).json()
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("tmd_serve")]
    requests = [line for line in lines if line["message"] == "request"]
    assert [(line["request_id"], line["status"], line["path"]) for line in requests] == [("r1", 200, "/v1/videos")]
    assert requests[0]["job"] == made["id"] and "secret" not in json.dumps(lines)


def test_a_fault_is_an_answer_with_the_request_id_and_no_traceback(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyError("/secret/path")

    monkeypatch.setattr(place.store, "counts", fail)
    answer = place.client.get("/readyz", headers={"X-Request-ID": "r2"})
    assert answer.status_code == 500
    assert "r2" in answer.json()["error"]["message"] and "secret" not in answer.text


def test_a_client_that_goes_away_within_its_body_is_no_fault_of_the_server(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    coming: list[Message] = [
        {"type": "http.request", "body": b'{"prompt"', "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> Message:
        return coming.pop(0)

    async def send(_: Message) -> None: ...

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "headers": headers}
    asyncio.run(place.app(scope, receive, send))
    assert place.store.counts()["queued"] == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert 'route="/v1/videos",status="400"' in place.client.get("/metrics").text


def test_a_store_that_fails_is_no_lost_request(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmd_serve.store.database._BUSY_SECONDS", 0.05)
    held = Place(place.settings.data)  # with the short patience
    with place.database.write():
        answer = held.client.post("/v1/videos", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (
        503,
        "store_failed",
        "5",
    )


def test_ready_means_that_jobs_are_run(place: Place) -> None:
    assert place.client.get("/readyz").json() == {"status": "ready"}
    place.executor.board.close()
    assert place.client.get("/readyz").status_code == 503
    assert place.client.get("/healthz").status_code == 200


def test_metrics_name_routes_and_not_the_addresses_that_somebody_asked_for(place: Place) -> None:
    for path in ("/v1/videos/video_abc", "/v1/videos/other", "/random/1", "/random/2"):
        place.client.get(path)
    place.client.post("/v1/videos", json={"prompt": "x"})
    text = place.client.get("/metrics").text
    assert 'tmd_requests_total{method="GET",route="/v1/videos/{video_id}",status="404"} 2.0' in text
    assert 'tmd_requests_total{method="GET",route="other",status="404"} 2.0' in text
    assert 'tmd_jobs{status="queued"} 1' in text
    assert "random" not in text and "video_abc" not in text
