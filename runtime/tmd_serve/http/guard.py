"""What stands in front of every route: request ids, the log, who may ask from where, API keys, and bounds on bodies.

On a laptop there is no key. There the browser is the danger: another web page may send requests to this machine
(refused by Origin and Sec-Fetch-Site), or have its own name point to it, which is called DNS rebinding (refused by
Host).
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders

from ..errors import Refusal
from .intake import Intake

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ..meters import RequestMeters
    from ..settings import ServeSettings

_LOG = logging.getLogger("tmd_serve.requests")
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
_OPEN = ("/healthz", "/readyz", "/openapi.json")
_READING = ("GET", "HEAD", "OPTIONS")


class Keys(Protocol):
    """Knows API keys."""

    def owner(self, key: str) -> str | None:
        """The id of a key, None for one that is not ours."""


class Guard:
    """The outermost layer of an application."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, keys: Keys | None, meters: RequestMeters) -> None:
        self._app, self._settings, self._keys, self._meters = app, settings, keys, meters
        self._intake = Intake(settings.limits.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers, begin = Headers(scope=scope), time.perf_counter()
        given = headers.get("x-request-id", "")
        number = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {}).update(request_id=number, owner="")
        status = 500

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._mark(MutableHeaders(scope=message), number, headers.get("origin"))
            await send(message)

        try:
            await self._check(scope, headers)
        except Refusal as refusal:
            await send_refusal(answer, refusal)
        else:
            with self._intake.open(receive) as bounded:
                await self._app(scope, receive if scope["method"] in _READING else bounded, answer)
        finally:
            self._note(scope, status, time.perf_counter() - begin, number)

    def _mark(self, headers: MutableHeaders, number: str, origin: str | None) -> None:
        headers["X-Request-ID"] = number
        headers.setdefault("X-Content-Type-Options", "nosniff")
        headers.setdefault("Cache-Control", "no-store")
        headers.setdefault("Cross-Origin-Resource-Policy", "same-origin")
        if origin is not None and origin in self._settings.origins:
            headers["Access-Control-Allow-Origin"] = origin
            headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            headers.add_vary_header("Origin")

    def _note(self, scope: Scope, status: int, seconds: float, number: str) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        method = scope["method"] if scope["method"] in (*_READING, "POST", "DELETE") else "other"
        self._meters.answered(method, route, status, seconds)
        state = scope["state"]
        about = {
            "request_id": number, "method": method, "path": scope["path"][:200], "status": status,
            "seconds": round(seconds, 4), "owner": state.get("owner") or None, "job": state.get("job"),
        }  # fmt: skip
        _LOG.log(logging.DEBUG if scope["path"] in _OPEN and status < 500 else logging.INFO, "request", extra=about)

    async def _check(self, scope: Scope, headers: Headers) -> None:
        """Raises Refusal for a request that may not come in."""
        settings = self._settings
        self._check_host(headers.get("host", ""))
        self._check_origin(scope, headers)
        self._intake.check(headers.get("content-length", ""))
        if settings.needs_key and _is_guarded(scope) and not self._is_preflight(scope, headers):
            scope["state"]["owner"] = await self._owner(headers.get("authorization", ""))

    def _check_host(self, host: str) -> None:
        accepted = self._settings.hosts
        if accepted is None:
            return
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) and not host.endswith("]") else host
        if name.strip("[]").lower() not in accepted:
            raise Refusal(
                f"this server does not go by the name {host[:80]!a}: use localhost, or start it with "
                "--allow-host NAME.",
                403,
                "host_not_allowed",
            )

    def _check_origin(self, scope: Scope, headers: Headers) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin is not None and origin in self._settings.origins:
            return
        foreign = origin is not None and urlsplit_host(origin) != headers.get("host", "").lower()
        if foreign or (site in ("cross-site", "same-site") and scope["method"] not in _READING):
            raise Refusal(
                "this request comes from a web page of another place: start the server with --allow-origin ORIGIN if "
                "that page may use it.",
                403,
                "origin_not_allowed",
            )

    def _is_preflight(self, scope: Scope, headers: Headers) -> bool:
        """Whether a browser asks what a page of an allowed origin may do; it sends no key then."""
        return scope["method"] == "OPTIONS" and headers.get("origin") in self._settings.origins

    async def _owner(self, authorization: str) -> str:
        kind, _, key = authorization.partition(" ")
        owner = None
        if kind.lower() == "bearer" and key and self._keys is not None:
            owner = await run_in_threadpool(self._keys.owner, key.strip())
        if owner is None:
            why = "is unknown here" if key else "is missing"
            raise Refusal(
                f"the API key {why}: send Authorization: Bearer KEY, with a key of tmd-serve keys add.",
                401,
                "invalid_api_key",
            )
        return owner


def _is_guarded(scope: Scope) -> bool:
    """Whether a route needs a key. Where a proxy or Ray puts a prefix in front, the routes see what follows it."""
    paths = scope["path"], scope["path"].removeprefix(scope.get("root_path", ""))
    return any(path.startswith("/v1/") or path in ("/v1", "/metrics") for path in paths)


def urlsplit_host(origin: str) -> str | None:
    """Host and port of an origin, in lower case; None for what has none ("null")."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


async def send_refusal(send: Send, refusal: Refusal) -> None:
    """Answers with an error, outside of any route."""
    body = json.dumps(refusal.document()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
