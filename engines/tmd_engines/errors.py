"""The two errors of this package. Each carries one message for people: what, why, and what to do."""

from __future__ import annotations


class BundleError(Exception):
    """A bundle is missing, incomplete, damaged or breaks a rule of `docs/bundle.md`."""


class EngineError(Exception):
    """A graph cannot be loaded, bound or run on the engine and device that were asked for."""


def quote(value: object, limit: int = 80) -> str:
    """Untrusted text for a message: ASCII with escapes (nothing reaches the terminal raw), cut at `limit`."""
    if isinstance(value, list | dict):
        return f"a {type(value).__name__}"
    text = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[:limit] + "..."


def one_line(error: Exception) -> str:
    """What a library said, without its line breaks and at most 500 characters, to stand inside our own message."""
    return " ".join(str(error).split())[:500]
