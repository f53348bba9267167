"""The parts of the OpenAPI document that FastAPI does not find by itself: bodies of two kinds, and our errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from .answers import ErrorBody
from .bodies import ImageRequest, VideoRequest

_MEANINGS = {
    400: "The request cannot be granted",
    401: "The API key is missing or wrong",
    403: "The request came from another web page, or for another host",
    404: "There is no such thing",
    408: "The body did not come in time",
    409: "Not now, or not with this key",
    413: "The request is too large",
    415: "The body is neither JSON nor a form",
    416: "The file has no such part",
    429: "Too much at once: see Retry-After",
    500: "The run failed",
    503: "The server is ending",
}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its documentation."""
    return {status: {"model": ErrorBody, "description": _MEANINGS[status]} for status in statuses}


def body_of(model: str, file: str | None = None) -> dict[str, Any]:
    """The request body of a route that reads it itself: JSON, and a form where a field may be a `file`."""
    reference = {"$ref": f"#/components/schemas/{model}"}
    content: dict[str, Any] = {"application/json": {"schema": reference}}
    if file is not None:
        content["multipart/form-data"] = {"schema": {"$ref": f"#/components/schemas/{model}Form"}}
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of an application, made once."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for kind in (VideoRequest, ImageRequest):
            schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[kind.__name__] = schema
        form = {**schemas["VideoRequest"], "title": "VideoRequestForm"}
        picture = {"type": "string", "format": "binary", "description": "A picture to start from."}
        form["properties"] = {**form["properties"], "input_reference": picture}
        schemas["VideoRequestForm"] = form
        schemas.pop("HTTPValidationError", None)
        schemas.pop("ValidationError", None)
        for path in made["paths"].values():
            for operation in path.values():
                # Ours is a 400.
                operation.get("responses", {}).pop("422", None)
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema
