"""Databases of both kinds, and an application without models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from tests.helpers.postgres import postgres
from tests.helpers.serving import Place
from tmd_serve.store.database import Database


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database."""
    if request.param == "sqlite":
        opened = Database.of_file(tmp_path / "jobs.sqlite3")
        yield opened
        opened.close()
        return
    url = request.getfixturevalue("postgres_url")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)
