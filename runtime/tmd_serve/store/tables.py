"""The tables, the same in SQLite and in PostgreSQL."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_VERSION = 1

METADATA = MetaData()

META = Table("tmd_meta", METADATA, Column("schema_version", Integer, nullable=False))

JOBS = Table(
    "tmd_jobs",
    METADATA,
    # The order of coming. SQLite counts only a column of its own type INTEGER.
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("model", Text, nullable=False),
    # Texts of users are inside JSON: PostgreSQL's TEXT has no NUL.
    Column("request", JSON, nullable=False),
    Column("resolved", JSON, nullable=False),
    Column("group", Text, nullable=False),
    Column("estimated_seconds", Float),
    Column("owner", String(40), nullable=False),
    Column("idempotency_key", String(255)),
    Column("fingerprint", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("started_at", Float),
    Column("completed_at", Float),
    Column("expires_at", Float),
    Column("attempts", Integer, nullable=False),
    Column("overtaken", Integer, nullable=False),
    Column("cancelling", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("error_code", String(64)),
    Column("error_message", JSON),
    Column("progress", JSON, nullable=False),
    Column("result", JSON, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("worker", String(128)),
    Column("lease_until", Float),
    UniqueConstraint("owner", "idempotency_key", name="tmd_jobs_idempotency"),
    Index("tmd_jobs_status", "status", "number"),
    sqlite_autoincrement=True,  # a number is never used again
)

KEYS = Table(
    "tmd_keys",
    METADATA,
    Column("id", String(40), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
)
