"""The application, put together from a store, an executor and settings."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tmd_runtime import RuntimeFailure, UsageFailure

from ..errors import Refusal
from ..executor import Executor
from ..files import DataFolder
from ..jobs import JobStore, StoreFailure
from ..meters import RequestMeters
from ..settings import ServeSettings
from . import images, models, operations, videos
from .context import Context
from .guard import Guard, Keys
from .page import add_page
from .schema import document
from .sentences import refusal_of

_LOG = logging.getLogger("tmd_serve.requests")
_DESCRIPTION = """\
Videos from prompts, by few-step models. OpenAI's videos API, and under the key `tmd` of its objects what these models
have besides.
"""


def create_app(
    store: JobStore,
    executor: Executor,
    settings: ServeSettings,
    keys: Keys | None = None,
    registry: CollectorRegistry | None = None,
) -> FastAPI:
    """The HTTP application over a store and an executor, which the caller starts and stops.

    `keys` answers for API keys where `settings.needs_key`; `registry` holds the meters of the executor, if it has any.
    """
    registry = registry or CollectorRegistry()
    app = FastAPI(title="tmd-serve", version=_version(), description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.context = Context(store, executor, settings, DataFolder(settings.data))
    app.state.registry = registry
    for room in (videos, images, models, operations):
        app.include_router(room.router)
    add_page(app)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(ClientDisconnect, _left)
    app.add_exception_handler(RuntimeFailure, _not_granted)
    app.add_exception_handler(StoreFailure, _not_kept)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _fault)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=sorted(settings.origins), allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "idempotency-key", "last-event-id"],
        )  # fmt: skip
    app.add_middleware(Guard, settings=settings, keys=keys, meters=RequestMeters(registry))
    return app


def _version() -> str:
    try:
        return version("tmd-runtime")
    except PackageNotFoundError:
        return "0"


def _answer(refusal: Refusal) -> JSONResponse:
    return JSONResponse(refusal.document(), refusal.status, refusal.headers)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)
    return _answer(error)


async def _left(_: Request, __: Exception) -> JSONResponse:
    """For a client that went away within its body, and reads no answer; the log and the meters show this one."""
    return _answer(Refusal("the client went away before its request was whole.", 400, "incomplete"))


async def _not_granted(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, UsageFailure):
        _LOG.error("a request failed", exc_info=error, extra={"request_id": request.state.request_id})
    return _answer(Refusal(str(error)))


async def _not_kept(request: Request, error: Exception) -> JSONResponse:
    _LOG.error("the store fails", exc_info=error, extra={"request_id": request.state.request_id})
    return _answer(
        Refusal(
            "the server's database does not answer, or its disk is full; nothing has happened: come again, and look "
            "into the server's log if this stays.",
            503,
            "store_failed",
            retry_after=5,
        )
    )


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _answer(refusal_of(error.errors()))


async def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    messages = {
        404: "there is nothing at this address: see /openapi.json.",
        405: f"this address does not take {request.method}: see /openapi.json.",
    }
    made = _answer(Refusal(messages.get(error.status_code, f"{error.detail}."), error.status_code, None))
    made.headers.update(error.headers or {})
    return made


async def _fault(request: Request, error: Exception) -> JSONResponse:
    number = getattr(request.state, "request_id", "unknown")
    return _answer(Refusal(f"the server made a mistake; its log says more of request {number}.", 500, "server_error"))
