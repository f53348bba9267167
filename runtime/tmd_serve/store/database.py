"""One database: how it is opened, what a transaction is, and what time it has."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, make_url, select, text
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from ..jobs import StoreFailure
from .tables import META, METADATA, SCHEMA_VERSION

if TYPE_CHECKING:
    from pathlib import Path

_BUSY_SECONDS = 30.0


class DatabaseFailure(Exception):
    """A database cannot be used. The message says why, and what to do."""


class Database:
    """A SQLite file or a PostgreSQL server, with the tables in place.

    `is_private` says whether this machine alone uses it. SQLite runs in WAL mode, and a commit is on the disk.
    """

    def __init__(self, url: str | URL) -> None:
        """Raises DatabaseFailure if it cannot be opened, or is of a newer version."""
        try:
            self.url = make_url(url)
            if self.url.drivername in ("postgres", "postgresql"):  # the driver that we install, not SQLAlchemy's own
                self.url = self.url.set(drivername="postgresql+psycopg")
            self._engine: Engine = create_engine(self.url, **_options(self.url.get_backend_name()))
        except (ArgumentError, ImportError, NoSuchModuleError) as error:
            raise DatabaseFailure(
                f"this database cannot be opened ({error}): check the URL, and pip install 'psycopg[binary]' for "
                "PostgreSQL."
            ) from error
        self.is_private = self._engine.dialect.name == "sqlite"
        if self.is_private:
            event.listen(self._engine, "connect", _prepare_sqlite)
            event.listen(self._engine, "begin", _begin_sqlite)
        try:
            self._create()
        except StoreFailure as error:
            raise DatabaseFailure(f"{error} Check its URL, its server and its rights.") from error
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            raise DatabaseFailure(
                f"the database {self.url.render_as_string()} cannot be used ({reason}): bring a backup of it back, or "
                "name another one."
            ) from error

    @classmethod
    def of_file(cls, path: Path) -> Database:
        """A SQLite file."""
        return cls(URL.create("sqlite", database=str(path)))

    def _create(self) -> None:
        with self.write() as connection:
            if not self.is_private:  # two servers may start at the same time
                connection.execute(text("SELECT pg_advisory_xact_lock(7461531)"))
            METADATA.create_all(connection)
            found = connection.execute(select(META.c.schema_version)).scalar()
            if found is None:
                connection.execute(insert(META).values(schema_version=SCHEMA_VERSION))
            elif found != SCHEMA_VERSION:
                raise DatabaseFailure(
                    f"the database has version {found} of the tables, and this server knows {SCHEMA_VERSION}: use the "
                    "version of tmd that made it, or another database."
                )

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that changes something; SQLite lets one go on at a time."""
        with (
            _answering(),
            self._engine.connect().execution_options(tmd_writes=True) as connection,
            connection.begin(),
        ):
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with _answering(), self._engine.connect() as connection, connection.begin():
            yield connection

    def now(self, connection: Connection) -> float:
        """Seconds since 1970 by the clock that all users of the database share."""
        if self.is_private:
            return time.time()
        return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def close(self) -> None:
        self._engine.dispose()


def _options(kind: str) -> dict[str, Any]:
    """What an engine of this kind of database is made with. Raises DatabaseFailure for one that we do not know."""
    if kind == "sqlite":
        return {"connect_args": {"timeout": _BUSY_SECONDS}, "poolclass": QueuePool, "pool_size": 8}
    if kind == "postgresql":
        return {"pool_pre_ping": True, "pool_size": 8}
    raise DatabaseFailure("a database is sqlite:///FILE or postgresql://USER@HOST/NAME: name one.")


@contextmanager
def _answering() -> Iterator[None]:
    """What a database does not do for reasons of its own is a StoreFailure: it is gone, locked or full."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise StoreFailure(f"the database does not answer ({reason}).") from error


def _prepare_sqlite(connection: Any, _: object) -> None:
    # The driver would begin transactions by itself, and only before the first change.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that begins by reading and then writes may fail at once, however long it would wait.
    writes = connection.get_execution_options().get("tmd_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
