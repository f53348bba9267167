"""What programs print, for people and for other programs, over streams that may be closed, full or gone."""

from __future__ import annotations

import os
import sys
import unicodedata
from contextlib import suppress
from typing import Any

import click

from ..errors import EngineError

_LONGEST = 2000


def clean(text: str, longest: int = _LONGEST) -> str:
    """Text that may come from a file, as a screen may have it: control characters as escapes, cut if it is long."""
    cut = text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
    return "".join(character if _is_plain(character) else _escaped(character) for character in cut)


def _is_plain(character: str) -> bool:
    # Cc: escapes and the like; Cf: among them what turns the direction of writing; Zl, Zp: line ends of their own
    return character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def tell(text: str) -> None:
    """A line for people, on stderr. That nobody can read it is no reason to end a run."""
    try:
        click.echo(clean(text), err=True)
    except (OSError, ValueError):
        silence(2, "stderr")


def say(text: str) -> None:
    """A line of the result, on stdout. Raises EngineError if it cannot be written."""
    try:
        click.echo(text)
    except (OSError, ValueError) as error:
        silence(1, "stdout")
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise EngineError(f"cannot write to stdout: {reason}. Files that were written are complete.") from error


def of_file(error: OSError) -> str:
    """What the system says of a file or folder, as a sentence that names it."""
    return f"{clean(str(error.filename), 200)}: {(error.strerror or str(error)).lower()}."


def repair_streams() -> None:
    """Gives stdin, stdout and stderr that are closed a place: the next file would be opened under their number, and
    whatever a library prints would go into it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        stream: Any = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  (stays open)
        elif mode == "w" and hasattr(stream, "reconfigure"):
            # A file name or prompt that the terminal cannot show must not end a run.
            stream.reconfigure(errors="backslashreplace")


def silence(number: int, name: str) -> None:
    """What is still in the buffers of a broken stream goes nowhere, instead of failing again at the end."""
    with suppress(OSError, ValueError):
        if getattr(sys, name).fileno() == number:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, number)
            os.close(null)
