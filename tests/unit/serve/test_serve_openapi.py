"""The OpenAPI document describes what the server does, and no request that it describes is a fault of the server."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.helpers.serving import Place

EXAMPLES = 12
FOLDER = tempfile.TemporaryDirectory(prefix="tmd-serve-fuzz-")
PLACE = Place(Path(FOLDER.name), hosts=frozenset({"testserver", "localhost"}))
FINISHED = PLACE.finish()
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", PLACE.app)
SCHEMA.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
# Events of a job that waits go on until it is over, and a picture is waited for.
FUZZED = SCHEMA.exclude(path_regex="/events$|/images/")


@FUZZED.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_described_request_gets_a_described_answer(case: schemathesis.Case) -> None:
    case.call_and_validate(
        checks=[
            not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
        ]
    )  # fmt: skip


def test_the_document_names_every_route_body_and_error() -> None:
    document: dict[str, Any] = PLACE.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        "/v1/videos", "/v1/videos/{video_id}", "/v1/videos/{video_id}/content", "/v1/videos/{video_id}/cancel",
        "/v1/videos/{video_id}/events", "/v1/images/generations", "/v1/models", "/v1/models/{model}",
        "/healthz", "/readyz", "/metrics",
    }  # fmt: skip
    bodies = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"application/json", "multipart/form-data"}
    form = document["components"]["schemas"]["VideoRequestForm"]["properties"]
    assert form["input_reference"]["format"] == "binary"
    errors = {"$ref": "#/components/schemas/ErrorBody"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            for status, answer in operation["responses"].items():
                if status >= "4":
                    assert answer["content"]["application/json"]["schema"] == errors, (path, status)


def test_a_finished_video_fits_the_document() -> None:
    SCHEMA["/v1/videos/{video_id}"]["GET"].Case(path_parameters={"video_id": FINISHED}).call_and_validate()


@pytest.fixture(autouse=True, scope="module")
def _folder() -> Any:
    yield
    PLACE.database.close()
    FOLDER.cleanup()
