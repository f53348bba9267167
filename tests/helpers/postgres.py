"""A PostgreSQL server for one session of tests: a cluster of its own in a temporary folder, on a Unix socket alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.processes import wait_for

_PLACES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def _program(name: str) -> str | None:
    """Debian keeps PostgreSQL's own programs off the path."""
    return next((str(place / name) for place in _PLACES if (place / name).is_file()), shutil.which(name))


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty database. Skips, with the reason, where there is no PostgreSQL to start."""
    initdb, pg_ctl = _program("initdb"), _program("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed (apt install postgresql)")
    as_user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        runuser = shutil.which("runuser")
        if runuser is None or subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        as_user = [runuser, "-u", "postgres", "--"]
    # Not pytest's folder: a socket's path has at most 107 bytes, and another user must reach it.
    folder = Path(tempfile.mkdtemp(prefix="tmd-pg-"))
    try:
        if as_user:
            shutil.chown(folder, "postgres")
        cluster = folder / "cluster"

        def run(*command: str) -> None:
            done = subprocess.run([*as_user, *command], capture_output=True, text=True, cwd="/")
            if done.returncode:
                pytest.skip(f"PostgreSQL cannot be started: {(done.stderr or done.stdout).strip()[-300:]}")

        run(initdb, "-D", str(cluster), "-U", "tmd", "--auth=trust", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        run(pg_ctl, "-D", str(cluster), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql+psycopg://tmd@/postgres?host={folder}"
        finally:
            # pg_ctl's own wait looks once a second.
            stop = [*as_user, pg_ctl, "-D", str(cluster), "-m", "immediate", "-W", "stop"]
            subprocess.run(stop, capture_output=True, cwd="/")
            wait_for(lambda: not (cluster / "postmaster.pid").exists(), seconds=20)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
