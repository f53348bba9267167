"""API keys in a database, as sha256 of 256 random bits: nobody guesses such a key, so no slow hash is needed."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import delete, insert, select
from sqlalchemy.exc import IntegrityError

from .database import Database
from .tables import KEYS

PREFIX = "tmd-"


@dataclass(frozen=True)
class Key:
    """What is kept of a key."""

    id: str
    name: str
    created_at: float


class SqlKeys:
    """The keys of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, name: str) -> str:
        """A new key, which is shown this once. Raises ValueError if the name is taken."""
        key = PREFIX + secrets.token_urlsafe(32)
        row = {"id": f"key_{secrets.token_hex(8)}", "name": name, "sha256": _digest(key)}
        try:
            with self._database.write() as connection:
                connection.execute(insert(KEYS).values(row | {"created_at": self._database.now(connection)}))
        except IntegrityError:
            raise ValueError(f"there is a key {name!r} already: choose another name, or remove that one.") from None
        return key

    def list(self) -> list[Key]:
        """Oldest first."""
        query = select(KEYS.c.id, KEYS.c.name, KEYS.c.created_at).order_by(KEYS.c.created_at, KEYS.c.name)
        with self._database.read() as connection:
            return [Key(*row) for row in connection.execute(query)]

    def remove(self, name: str) -> bool:
        """Forgets a key: it is refused from now on."""
        with self._database.write() as connection:
            return connection.execute(delete(KEYS).where(KEYS.c.name == name)).rowcount == 1

    def owner(self, key: str) -> str | None:
        """The id of a key; None: it is not one of ours."""
        with self._database.read() as connection:
            # The digest is looked up, not the key: how long that takes says nothing of any key.
            found: str | None = connection.execute(select(KEYS.c.id).where(KEYS.c.sha256 == _digest(key))).scalar()
        return found


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
