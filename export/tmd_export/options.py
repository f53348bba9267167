"""Kinds of values that options of `tmd-export` take, with errors in words. Nothing but click is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tmd_engines.command.options import plain

from .loras import LoraFile, parse_lora
from .parts import PARTS, PRECISIONS, ordered, parse_precision

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Parts(click.ParamType["tuple[str, ...]"]):
    """Names of graphs, separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return ordered(part.strip() for part in value.split(",") if part.strip())
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Precision(click.ParamType[str]):
    """A precision for all graphs, or one by one."""

    name = "precision"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_precision(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        parts = [f"{part}={name}" for part in PARTS for name in PRECISIONS] if last else []
        return plain((f"{before}{comma}{name}" for name in (*PRECISIONS, *parts)), incomplete)


class Lora(click.ParamType[LoraFile]):
    """A file, and behind the last "=" its strength."""

    name = "lora"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> LoraFile:
        if isinstance(value, LoraFile):
            return value
        try:
            return parse_lora(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
