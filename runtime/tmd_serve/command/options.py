"""The kinds of values that options of `tmd-serve` have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What the name of a model may be."""


def place_name(place: str) -> str:
    """The name of a model whose bundle was given none: its folder's, or what stands behind `builtin:`."""
    return place.rstrip("/").replace("\\", "/").rpartition("/")[2].removeprefix("builtin:")


class Amount(click.ParamType):
    """Bytes: a whole number, with K, M, G or T behind it."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,12})([KMGT]?)B?", str(value).upper())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a number of bytes: write 20M or 10G, say.", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


class Named(click.ParamType):
    """`NAME=DIR`, a folder, or `builtin:NAME`; without a name the folder's own, or the one behind `builtin:`."""

    name = "bundle"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        head, equals, tail = str(value).partition("=")
        if equals and NAME.fullmatch(head):
            name, place = head, tail
        else:
            place = str(value)
            name = place_name(place)
        if not place or "\0" in place:
            self.fail("a bundle needs a folder, or builtin:NAME.", param, ctx)
        if not NAME.fullmatch(name):
            self.fail(
                f"{name!r} cannot be the name of a model: write NAME={place} with letters, digits, '.', '_' or '-'.",
                param,
                ctx,
            )
        return name, place

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from tmd_engines.command.options import BundleFolder, plain

        name, equals, place = incomplete.rpartition("=")
        folders, *built_in = BundleFolder().shell_complete(ctx, param, place)
        return [folders, *plain((f"{name}{equals}{item.value}" for item in built_in), incomplete)]
