"""Requests and answers in OpenAI's shapes, over an executor that runs nothing."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.serving import Place
from tmd_serve.http.context import Context
from tmd_serve.jobs import Job
from tmd_serve.settings import Limits

PNG = base64.b64encode(b"\x89PNG").decode()


def refused(answer: Any, status: int = 400, code: str | None = None, param: str | None = None) -> str:
    """Sees that an answer is an error in OpenAI's shape; returns its message."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") and error["message"][:1] != " "
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    return str(error["message"])


def test_json_and_form_ask_for_the_same(place: Place) -> None:
    fields = {
        "prompt": "x",
        "size": "64x48",
        "frames": 5,
        "fps": 12,
        "steps": 2,
        "guidance": 1.5,
        "seed": 7,
        "preview": True,
    }
    by_json = place.client.post("/v1/videos", json={**fields, "schedule": [1, 0.5, 0]})
    by_form = place.client.post("/v1/videos", data={**fields, "preview": "true", "schedule": "1,0.5,0"})
    assert by_json.status_code == by_form.status_code == 200
    first, second = place.executor.planned
    assert first == second
    assert first.wishes == {
        "steps": 2,
        "seed": 7,
        "guidance": 1.5,
        "schedule": [1, 0.5, 0],
        "size": (64, 48),
        "frames": 5,
        "fps": 12,
    }


def test_a_key_of_pictures_is_as_long_as_one_of_videos_and_never_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(_: object, context: Context, job: Job) -> Job:
        return job

    monkeypatch.setattr("tmd_serve.http.images._wait", at_once)
    monkeypatch.setattr("tmd_serve.http.images._picture", lambda *_: {"b64_json": "", "tmd": {}})

    def ask(path: str, key: str) -> int:
        return place.client.post(path, json={"prompt": "x"}, headers={"Idempotency-Key": key}).status_code

    assert [ask("/v1/images/generations", "k" * count) for count in (200, 200, 201)] == [200, 200, 400]
    assert place.store.counts()["queued"] == 1
    assert [ask("/v1/videos", "a#0"), ask("/v1/images/generations", "a"), ask("/v1/videos", "a 0")] == [200, 200, 400]


def test_a_new_video_is_queued_and_looks_like_openai_s(place: Place) -> None:
    video = place.client.post("/v1/videos", json={"prompt": "x", "seconds": "4"}).json()
    assert video["object"] == "video" and video["id"].startswith("video_")
    assert (video["status"], video["progress"], video["model"], video["size"]) == ("queued", 0, "clips", "64x64")
    assert (video["error"], video["completed_at"], video["remixed_from_video_id"]) == (None, None, None)
    assert video["tmd"]["queue_position"] == 0
    assert place.executor.planned[0].seconds == 4
    assert place.client.get(f"/v1/videos/{video['id']}").json() == video


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "size": "big"}, "size"),
        ({"prompt": "x", "size": "0x64"}, "size"),
        ({"prompt": "x", "steps": 0}, "steps"),
        ({"prompt": "x", "steps": True}, "steps"),
        ({"prompt": "x", "steps": 1.5}, "steps"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "schedule": [1]}, "schedule"),
        ({"prompt": "x", "seconds": "soon"}, "seconds"),
        ({"prompt": "x", "frames": 5, "seconds": 1}, "seconds"),
        ({"prompt": ["x"]}, "prompt"),
        ({"prompt": "x", "colour": "red"}, "colour"),
        ({"prompt": "x", "input_reference": "https://example.org/cat.png"}, "input_reference"),
        ({"prompt": "x", "input_reference": "file:///etc/passwd"}, "input_reference"),
        ({"prompt": "x", "input_reference": {"file_id": "file_1"}}, "input_reference"),
        ({"prompt": "x", "input_reference": "data:image/png;base64,###"}, "input_reference"),
    ],
)
def test_a_bad_field_is_named(place: Place, body: dict[str, Any], param: str) -> None:
    refused(place.client.post("/v1/videos", json=body), param=param)


def test_bodies_that_cannot_be_read_are_refused(place: Place) -> None:
    post = place.client.post
    head = {"Content-Type": "application/json"}
    for body in (
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000,
    ):
        refused(post("/v1/videos", content=body, headers=head))
    refused(post("/v1/videos", content=b"x", headers={"Content-Type": "text/plain"}), 415)
    refused(post("/v1/videos", content=b"x", headers={"Content-Type": "multipart/form-data"}), code="invalid_form")
    refused(post("/v1/videos", content=b"x", headers={"Content-Type": "multipart/form-data; boundary=y"}))
    refused(post("/v1/videos", data={"prompt": ["a", "b"]}), param="prompt")
    refused(post("/v1/videos", data={"prompt": "a", "schedule": "[" * 20_000}), param="schedule")
    refused(post("/v1/videos", data={"prompt": "a"}, files={"other": b"x"}), param="other")
    refused(post("/v1/videos", data={f"f{i}": "x" for i in range(100)}))
    refused(post("/v1/videos", json={"prompt": " "}))
    assert place.store.counts()["queued"] == 0


def test_a_picture_comes_as_a_file_or_inside_the_request(place: Place) -> None:
    post = place.client.post
    post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("../../etc/passwd", b"\x89PNG", "image/png")})
    post("/v1/videos", json={"prompt": "x", "input_reference": {"image_url": f"data:image/png;base64,{PNG}"}})
    post("/v1/videos", data={"prompt": "x", "input_reference[image_url]": f"data:image/png;base64,{PNG}"})
    assert [wanted.picture for wanted in place.executor.planned] == [b"\x89PNG"] * 3
    videos = place.settings.data / "videos"
    assert {path.name for path in videos.rglob("*") if path.is_file()} == {"picture"}


def test_the_same_idempotency_key_gives_one_job_and_another_request_a_conflict(place: Place) -> None:
    key = {"Idempotency-Key": "k1"}
    first = place.client.post("/v1/videos", json={"prompt": "x"}, headers=key)
    again = place.client.post("/v1/videos", json={"prompt": "x"}, headers=key)
    assert first.json()["id"] == again.json()["id"]
    other = place.client.post("/v1/videos", json={"prompt": "y"}, headers=key)
    refused(other, 409, "idempotency_conflict")
    refused(place.client.post("/v1/videos", json={"prompt": "x"}, headers={"Idempotency-Key": "a b"}))
    assert place.store.counts()["queued"] == 1
    files, key = {"input_reference": b"\x89PNG"}, {"Idempotency-Key": "k2"}
    for _ in range(2):
        place.client.post("/v1/videos", data={"prompt": "x"}, files=files, headers=key)
    assert len(list((place.settings.data / "videos").iterdir())) == 1


def test_a_full_queue_says_when_to_come_again_and_keeps_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path, limits=Limits(waiting=2))
    files = {"input_reference": b"\x89PNG"}
    for _ in range(2):
        assert place.client.post("/v1/videos", data={"prompt": "x"}, files=files).status_code == 200
    for headers in ({}, {"Idempotency-Key": "new"}):
        full = place.client.post("/v1/videos", data={"prompt": "x"}, files=files, headers=headers)
        refused(full, 429, "queue_full")
        assert full.headers["retry-after"] == "2"
    assert len(list((tmp_path / "videos").iterdir())) == 2


def test_addresses_methods_and_ids_that_are_not_there(place: Place) -> None:
    refused(place.client.get("/nothing"), 404)
    refused(place.client.put("/v1/videos"), 405)
    assert place.client.put("/v1/videos").headers["allow"]
    for video in ("video_" + "0" * 32, "x", "..%2f..%2fetc%2fpasswd", "video_%00", "%e4"):
        for path in ("", "/content", "/events"):
            refused(place.client.get(f"/v1/videos/{video}{path}"), 404)
        refused(place.client.delete(f"/v1/videos/{video}"), 404)
        refused(place.client.post(f"/v1/videos/{video}/cancel"), 404)
    refused(place.client.get("/v1/models/none"), 404, "model_not_found", "model")
    refused(place.client.post("/v1/videos", json={"prompt": "x", "model": "none"}), 404, "model_not_found", "model")


def test_lists_page_by_the_last_id(place: Place) -> None:
    ids = [place.client.post("/v1/videos", json={"prompt": "x"}).json()["id"] for _ in range(3)]
    page = place.client.get("/v1/videos", params={"limit": 2}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    rest = place.client.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert ([video["id"] for video in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert [video["tmd"]["queue_position"] for video in page["data"]] == [2, 1]
    for params in ({"limit": 0}, {"limit": "x"}, {"limit": 101}, {"order": "up"}):
        refused(place.client.get("/v1/videos", params=params))
    refused(place.client.get("/v1/videos", params={"after": "video_" + "0" * 32}), 404)


def test_cancelling_and_deleting_reach_the_executor_and_the_files(place: Place) -> None:
    made = place.client.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": b"\x89PNG"}).json()["id"]
    cancelled = place.client.post(f"/v1/videos/{made}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    refused(place.client.get(f"/v1/videos/{made}/content"), 404, "cancelled")
    assert place.client.delete(f"/v1/videos/{made}").json() == {"id": made, "object": "video.deleted", "deleted": True}
    assert place.executor.cancelled == [made, made]
    assert list((place.settings.data / "videos").iterdir()) == []
    refused(place.client.get(f"/v1/videos/{made}"), 404)


def test_images_are_for_models_of_stills(place: Place) -> None:
    ask = place.client.post
    refused(ask("/v1/images/generations", json={"prompt": "x", "model": "clips"}), param="model")
    for body in ({"n": 0}, {"n": 11}, {"response_format": "url"}, {"frames": 5}):
        refused(ask("/v1/images/generations", json={"prompt": "x", **body}), param=next(iter(body)))


def test_hostile_bodies_are_never_a_fault_of_the_server(place: Place) -> None:
    """Bytes that no client of ours would send, which a document of the API does not describe."""
    chance = random.Random(1)
    names = [b"prompt", b"size", b"schedule", b"input_reference", b"seed", b"label", b"preview", b"", b"\xc3\xa4"]
    values = [
        b"",
        b"x",
        b"\xed\xa0\x80",
        b"\xff",
        b"\0",
        b"1e999",
        b"NaN",
        b"[[1]]",
        b"{}",
        b"9" * 5000,
        b"data:,",
        b"1_0",
    ]
    for _ in range(200):
        fields = [(b"prompt", b"x")] + [(chance.choice(names), chance.choice(values)) for _ in range(2)]
        form = b"".join(
            b'--B\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
            % (name, b'; filename="f"' if chance.random() < 0.2 else b"", value)
            for name, value in fields
        )
        kind, body = chance.choice(
            [
                ("application/json", b"{" + b",".join(b'"%b":%b' % field for field in fields[1:]) + b"}"),
                ("application/json", b"{" + b",".join(b'"%b":"%b"' % field for field in fields) + b"}"),
                ("application/x-www-form-urlencoded", b"&".join(b"%b=%b" % field for field in fields)),
                ("multipart/form-data; boundary=B", form + chance.choice([b"--B--\r\n", b"--B", b""])),
                ("multipart/form-data; boundary=B; charset=nonsense", form + b"--B--\r\n"),
            ]
        )
        answer = place.client.post("/v1/videos", content=body, headers={"Content-Type": kind})
        assert answer.status_code < 500, (kind, body)
