"""Prompts from a file: one per line, in bounds."""

from __future__ import annotations

from typing import Any

import click

from tmd_engines.command.screen import clean
from tmd_engines.utf8 import NOT_UTF_8, is_utf8

MAX_BYTES, MAX_PROMPTS, MAX_CHARACTERS = 4 << 20, 10_000, 65_536


def read_prompts(prompts: tuple[str, ...], prompt_file: Any) -> list[str]:
    """The prompts of the command line, then those of the file. Raises click.BadParameter.

    A line ends with a line feed, or carriage return and line feed, and nothing else: other characters belong to
    prompts. A line that begins with `#` is a comment.
    """
    texts = list(prompts)
    if any(not text.strip() for text in texts):
        raise click.BadParameter("the prompt is empty: describe the video in a few words.", param_hint="--prompt")
    if not all(map(is_utf8, texts)):
        raise click.BadParameter(f"the prompt {NOT_UTF_8}", param_hint="--prompt")
    if prompt_file is None:
        return texts
    found = [line.strip() for line in _read(prompt_file).split("\n")]
    found = [line for line in found if line and not line.startswith("#")]
    if not found:
        raise _bad(prompt_file, "holds no prompt: write one per line")
    if len(found) > MAX_PROMPTS:
        raise _bad(prompt_file, f"holds {len(found)} prompts: give at most {MAX_PROMPTS} at once")
    longest = max(map(len, found))
    if longest > MAX_CHARACTERS:
        raise _bad(prompt_file, f"has a line of {longest} characters: a prompt has at most {MAX_CHARACTERS}")
    return texts + found


def _read(prompt_file: Any) -> str:
    try:
        # Not all of it: it may be a pipe, or a device, without an end.
        content: bytes = prompt_file.read(MAX_BYTES + 1)
    except OSError as error:
        raise _bad(prompt_file, f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise _bad(prompt_file, f"is larger than {MAX_BYTES >> 20} MiB: give it in parts")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(prompt_file, "is not UTF-8 text: save it as UTF-8") from error


def _bad(prompt_file: Any, what: str) -> click.BadParameter:
    name = prompt_file.name if isinstance(prompt_file.name, str) else "<stdin>"
    return click.BadParameter(f"{clean(name)} {what}.", param_hint="--prompt-file")
