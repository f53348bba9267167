"""A hub of models on this machine: as much of the Hugging Face hub's API as `huggingface_hub` needs to download.

Served are the description of a repository, its tree, and its files with their ETag, commit and ranges. What it cannot
do that the hub can: pages of a long tree, redirects to another host, Xet.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit_of(repo: str) -> str:
    return hashlib.sha1(repo.encode()).hexdigest()


class Hub:
    """`repos`: name -> folder. Files of those that are `gated` need the token "secret". `breaks`: file -> bytes after
    which its first download loses the connection; `refuses`: files that are answered with an error. `asked` is what
    was: (method, path, Range)."""

    def __init__(self, **repos: Path) -> None:
        self.repos: dict[str, Path] = dict(repos)
        self.gated: set[str] = set()
        self.breaks: dict[str, int] = {}
        self.refuses: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self.url = ""

    def downloads(self) -> list[str]:
        """The files whose content was asked for, in order."""
        return [
            path.partition("/resolve/")[2].partition("/")[2] for method, path, _ in self.asked if _is_file(method, path)
        ]

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        hub = self

        class Handler(_Handler):
            served = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _is_file(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


class _Handler(BaseHTTPRequestHandler):
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.asked.append((self.command, path, self.headers.get("Range")))
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = match or file
        repo = found[1] if found else ""
        folder = self.served.repos.get(repo)
        if found is None or folder is None:
            return self._refuse(401, "RepoNotFound")  # as the hub answers, which does not say what is private
        revision = file[2] if file else match[3] if match else None
        if revision not in (None, "main", commit_of(repo)):
            return self._refuse(404, "RevisionNotFound")
        if file:
            return self._file(repo, folder, file[3])
        if match and match[2] == "tree":
            return self._json([_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()])
        return self._json({"id": repo, "sha": commit_of(repo), "siblings": []})

    def _file(self, repo: str, folder: Path, name: str) -> None:
        if repo in self.served.gated and self.headers.get("Authorization") != "Bearer secret":
            return self._refuse(401, "GatedRepo")
        if not (folder / name).is_file():
            return self._refuse(404, "EntryNotFound")
        if name in self.served.refuses:
            return self._refuse(403, "")
        content = (folder / name).read_bytes()
        etag, whole, start = hashlib.sha256(content).hexdigest(), len(content), 0
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start = int(span[1])
            content = content[: int(span[2]) + 1] if span[2] else content
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit_of(repo))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{whole}")
        self.end_headers()
        if self.command == "HEAD":
            return
        end = self.served.breaks.pop(name, None)
        self.wfile.write(content[start:end])
        if end is not None:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, document: object) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(folder: Path, path: Path) -> dict[str, object]:
    content = path.read_bytes()
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": len(content), "oid": blob}
