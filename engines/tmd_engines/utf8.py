"""Texts that may hold what is not Unicode: Python keeps bytes of names and arguments that are not UTF-8 as surrogates."""

from __future__ import annotations


def is_utf8(text: str) -> bool:
    """Whether a text can be written as UTF-8, and so into a file, JSON or another program."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
