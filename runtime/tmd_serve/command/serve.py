"""Puts a server together, and takes it apart again when a signal says so."""

from __future__ import annotations

import fcntl
import ipaddress
import logging
import os
import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import uvicorn
from prometheus_client import CollectorRegistry

from tmd_engines.command.screen import tell
from tmd_engines.cost.system_memory import available_bytes
from tmd_runtime import RuntimeFailure

from ..files import DataFolder, unusable
from ..http.app import create_app
from ..local.executor import LocalExecutor
from ..local.model import EngineOptions, open_models
from ..local.worker import Pace
from ..logs import set_up
from ..meters import RunMeters
from ..settings import Limits, ServeSettings
from ..store.database import Database
from ..store.sql_jobs import SqlJobs
from ..store.sql_keys import SqlKeys

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..board import Board

_LOG = logging.getLogger("tmd_serve")
_HOST = re.compile(r"[^\s/:]+|[0-9A-Fa-f:]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#]+/?")
_HEADER_BYTES = 1 << 15
_IDLE_SECONDS, _CONNECTIONS = 15, 1000
_LAST_ANSWERS = 2  # seconds that open connections have when the server ends
_ALONE_SECONDS = 5.0  # between looks for jobs that nobody announced, where nobody else accepts any
_STRANGE_SECONDS = 86400.0  # on a folder that others use too, a folder without a job may be of one that comes


class Server(uvicorn.Server):
    """Uvicorn's server. At the first signal event streams end, so that no connection keeps it."""

    def __init__(self, config: uvicorn.Config, board: Board) -> None:
        super().__init__(config)
        self._board = board

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not uvicorn's own: it would raise the signal again at its end, before the running job has been given back. The
        # watch over signals of every command (`run_program`) ends the process at a second one.
        self._board.close()
        self.should_exit = True


def open_database(data: Path, url: str | None) -> Database:
    """The database of a server, by default in its data folder. Raises DatabaseFailure."""
    _make_folder(data)
    return Database.of_file(data / "jobs.sqlite3") if url is None else Database(url)


def _make_folder(data: Path) -> None:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeFailure(
            f"the data folder {data} cannot be made ({error.strerror}): name another, --data DIR."
        ) from error


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(data: Path, database: str | None, **options: Any) -> None:
    """Serves until a signal comes. `options` are those of the command."""
    set_up(options["log_level"].upper())
    settings = _settings(data, options)
    with ExitStack() as stack:
        opened = open_database(data, database)
        stack.callback(opened.close)
        if opened.is_private:
            _lock(data, stack)
        keys = SqlKeys(opened)
        if settings.needs_key and not keys.list():
            raise click.UsageError(
                f"on {options['host']} every request needs an API key, and there is none: make one with tmd-serve keys "
                "add NAME, or listen on 127.0.0.1."
            )
        store = SqlJobs(opened, options["attempts"], options["keep"] * 86400)
        files, registry = DataFolder(data), CollectorRegistry()
        executor = _executor(store, files, settings.limits, opened.is_private, registry, options)
        recover(store, files, opened.is_private)
        _run(create_app(store, executor, settings, keys, registry), executor, options)


def _settings(data: Path, options: dict[str, Any]) -> ServeSettings:
    width, height = options["max_size"]
    if not width * height:
        raise click.UsageError("--max-size must have at least one pixel: write 1280x720, say.")
    _check_names(options["hosts"], options["origins"])
    local = is_loopback(options["host"])
    return ServeSettings(
        data=data,
        limits=Limits(
            pixels=width * height,
            frames=options["max_frames"],
            steps=options["max_steps"],
            seconds=options["max_seconds"],
            upload_bytes=options["max_upload"],
            waiting=options["max_waiting"],
        ),
        needs_key=options["require_key"] or not local,
        hosts=_hosts(options["hosts"], local),
        origins=frozenset(origin.rstrip("/") for origin in options["origins"]),
    )


def _check_names(hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
    """Refuses what no request's header could ever equal."""
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise click.UsageError(f"--allow-host {host!r} is not a name: leave http:// and the port out.")
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise click.UsageError(
                f"--allow-origin {origin!r} is not an origin: write https://example.org, without a path."
            )


def _executor(
    store: SqlJobs,
    files: DataFolder,
    limits: Limits,
    alone: bool,
    registry: CollectorRegistry,
    options: dict[str, Any],
) -> LocalExecutor:
    """Opens the models. Raises as `open_models` does."""
    bundles = dict(options["bundles"] or [("tiny", "builtin:tiny")])
    if len(bundles) < len(options["bundles"]):
        raise click.UsageError("two bundles have one name: give each its own, --bundle NAME=DIR.")
    engines = EngineOptions(options["engine"], options["device"], options["threads"], options["memory"])
    lease = options["lease"]
    return LocalExecutor(
        store,
        files,
        open_models(bundles, engines, limits),
        options["keep_bytes"],
        budget=options["memory_budget"] or available_bytes(),
        most_loaded=options["max_loaded"],
        pace=Pace(lease, min(2.0, lease / 4), _ALONE_SECONDS if alone else Pace.poll, most=limits.seconds),
        meters=RunMeters(registry),
    )


def _hosts(more: tuple[str, ...], local: bool) -> frozenset[str] | None:
    """Accepted names in the header Host. Where keys guard the server, a foreign name does no harm."""
    if not local and not more:
        return None
    return frozenset({"127.0.0.1", "localhost", "::1", *(name.lower() for name in more)})


def _lock(data: Path, stack: ExitStack) -> None:
    """Keeps a second server off the data folder, whose jobs it would take for those of a dead one."""
    try:
        descriptor = os.open(data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unusable(data / "lock", error) from error
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise RuntimeFailure(
            f"another tmd-serve uses the data folder {data}: end that one, name another folder (--data DIR), or share "
            "a PostgreSQL database (--database URL)."
        ) from None


def recover(store: SqlJobs, files: DataFolder, alone: bool) -> None:
    """What a server that was killed has left: unfinished jobs run again, and so do finished ones without their file."""
    if alone:
        again = store.recover()
        for job in store.completed():
            path = files.folder(job.id) / job.result["file"]
            if not path.is_file() or path.stat().st_size != job.result["bytes"]:
                store.restart(job.id)
                again += 1
        if again:
            _LOG.info("jobs run again", extra={"jobs": again})
    files.sweep(store.ids(), time.time() - (0 if alone else _STRANGE_SECONDS))


def _run(app: FastAPI, executor: LocalExecutor, options: dict[str, Any]) -> None:
    """Listens, runs jobs and answers requests until a signal comes."""
    listener = _listen(options["host"], options["port"])
    config = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=_LAST_ANSWERS,
        timeout_keep_alive=_IDLE_SECONDS,
        limit_concurrency=_CONNECTIONS,
    )
    host, port = listener.getsockname()[:2]
    try:
        executor.start()
        tell(f"tmd-serve: listening on http://{f'[{host}]' if ':' in host else host}:{port}")
        Server(config, executor.board).run(sockets=[listener])
    finally:
        executor.stop(options["grace"])
    _LOG.info("the server has ended")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except OSError as error:
        raise RuntimeFailure(
            f"cannot listen on {host} port {port} ({error.strerror}): choose another --port, or another --host."
        ) from None
