"""Texts that may not be Unicode: Python keeps bytes of names and arguments that are not UTF-8 as lone surrogates."""

from __future__ import annotations

import json
from typing import Any

NOT_UTF_8 = "holds bytes that are not UTF-8: give it as UTF-8, or correct the characters that a program garbled."
"""Behind the name of a text."""


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8, and so into a file, JSON or another program."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def json_text(document: Any, indent: int | None = 2) -> str:
    """A document for other programs: without NaN, and without lone surrogates, which stand there as \\udcff does.

    Raises ValueError for NaN.
    """
    return json.dumps(_plain(document), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value if is_utf8(value) else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
