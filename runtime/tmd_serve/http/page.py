"""The page: files of this package, read once, each under its own name. No path of a request reaches the file system."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response

PAGE = Path(__file__).parents[1] / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
_START = "index.html"
HEADERS = {
    # The page loads nothing from elsewhere, sends nothing elsewhere, and stands in no frame.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI, folder: Path = PAGE) -> None:
    """Routes for the files of the page; none where it is not installed."""
    for path in sorted(folder.glob("*")) if folder.is_dir() else []:
        if path.suffix in _TYPES and path.is_file():
            route = _route(path.read_bytes(), _TYPES[path.suffix])
            for name in [f"/{path.name}"] + ["/"] * (path.name == _START):
                app.add_api_route(name, route, methods=["GET", "HEAD"], include_in_schema=False)


def _route(content: bytes, kind: str) -> Callable[[Request], Response]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    def send(request: Request) -> Response:
        headers = {**HEADERS, "ETag": etag}
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return send
