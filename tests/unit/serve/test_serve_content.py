"""Files of finished videos, whole and in parts, and the page."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.helpers.serving import Place
from tmd_serve.http.page import add_page

CONTENT = b"0123456789"


@pytest.fixture
def video(place: Place) -> str:
    return f"/v1/videos/{place.finish(CONTENT)}/content"


@pytest.mark.parametrize(
    ("wanted", "status", "part", "where"),
    [
        (None, 200, CONTENT, None),
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, CONTENT, "bytes 0-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),  # RFC 9110, 15.5.17
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=5-2", 200, CONTENT, None),  # not understood: the whole file (RFC 9110, 14.2)
        ("bytes=0-1,3-4", 200, CONTENT, None),
        ("lines=1-2", 200, CONTENT, None),
        ("bytes=" + "9" * 30 + "-", 200, CONTENT, None),
    ],
)
def test_a_part_of_a_video(
    place: Place, video: str, wanted: str | None, status: int, part: bytes | None, where: str | None
) -> None:
    answer = place.client.get(video, headers={} if wanted is None else {"Range": wanted})
    assert answer.status_code == status
    assert part is None or answer.content == part
    assert answer.headers.get("content-range") == where
    if part is not None:
        assert answer.headers["content-type"] == "video/mp4" and answer.headers["accept-ranges"] == "bytes"


def test_what_a_client_has_is_not_sent_again(place: Place, video: str) -> None:
    tag = place.client.get(video).headers["etag"]
    for tags in (tag, f"W/{tag}", f'"x", {tag}', "*"):
        again = place.client.get(video, headers={"If-None-Match": tags})
        assert (again.status_code, again.content) == (304, b"")
    assert place.client.get(video, headers={"If-None-Match": '"x"'}).status_code == 200
    part = {"Range": "bytes=0-1"}
    assert place.client.get(video, headers={**part, "If-Range": tag}).content == b"01"
    assert place.client.get(video, headers={**part, "If-Range": '"old"'}).content == CONTENT


def test_head_says_what_get_would_send(place: Place, video: str) -> None:
    for path, size in ((video, "10"), ("/healthz", "15"), ("/readyz", "18"), ("/", None)):
        head, get = place.client.head(path), place.client.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        for name in ("content-length", "content-type", "etag", "accept-ranges"):
            assert head.headers.get(name) == get.headers.get(name), (path, name)
        assert size in (None, head.headers["content-length"])


def test_the_thumbnail_is_another_file_with_another_tag(place: Place, video: str) -> None:
    small = place.client.get(video, params={"variant": "thumbnail"})
    assert (small.content, small.headers["content-type"]) == (b"png", "image/png")
    assert small.headers["etag"] != place.client.get(video).headers["etag"]
    assert place.client.get(video, params={"variant": "other"}).status_code == 400


def test_a_video_that_is_not_done_has_no_content(place: Place) -> None:
    made = place.client.post("/v1/videos", json={"prompt": "x"}).json()["id"]
    answer = place.client.get(f"/v1/videos/{made}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "not_ready")


def test_the_page_is_its_files_by_name_under_a_strict_policy(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "app.js").write_text("1")
    (tmp_path / "notes.txt").write_text("no")
    (tmp_path / "sub").mkdir()
    app = FastAPI()
    add_page(app, tmp_path)
    client = TestClient(app)
    start = client.get("/")
    assert start.text == "<!doctype html>" == client.get("/index.html").text
    policy = start.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'") and "unsafe" not in policy
    script = client.get("/app.js")
    assert script.headers["content-type"].startswith("text/javascript")
    assert client.get("/app.js", headers={"If-None-Match": script.headers["etag"]}).status_code == 304
    for path in ("/notes.txt", "/sub", "/..%2fapp.js", "/%2e%2e/app.js", "/sub/../notes.txt"):
        assert client.get(path).status_code == 404, path
