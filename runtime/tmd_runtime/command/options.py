"""Kinds of values that options take, with errors in words. Nothing but click is imported, for the sake of `--help`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import click

from ..files.target import named
from ..settings import WIDE_SEED


class Whole(click.ParamType):
    """A whole number in a range; says so in words where click would print an inequality."""

    name = "number"

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        # Length first: Python refuses to read numbers of thousands of digits, with an error of its own.
        if not isinstance(value, int) and not re.fullmatch(r"\s*[+-]?[0-9]{1,40}\s*", value):
            self.fail(f"{value[:40]!r} is no whole number.", param, ctx)
        number = int(value)
        if number < self.low or (self.high is not None and number > self.high):
            if param is not None and param.name == "seed" and number > 0:
                self.fail(f"{number} is out of range: {WIDE_SEED}", param, ctx)
            allowed = f"{self.low} or more" if self.high is None else f"from {self.low} to {self.high}"
            self.fail(f"{number} is out of range: give a whole number, {allowed}.", param, ctx)
        return number


class Number(click.ParamType):
    """A finite number in a range; says so in words."""

    name = "number"

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{str(value)[:40]!r} is no number.", param, ctx)
        if not self.low <= number <= self.high:
            self.fail(f"{value} is out of range: give a number from {self.low:g} to {self.high:g}.", param, ctx)
        return number


class Schedule(click.ParamType):
    """Times separated by commas."""

    name = "times"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            times = tuple(float(part) for part in value.split(","))
        except ValueError:
            times = (math.nan,)
        if not all(map(math.isfinite, times)):
            self.fail(f"{value[:80]!r} is no list of times: write them like 1,0.6,0.2,0.", param, ctx)
        return times


class Output(click.ParamType):
    """Where a result goes."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        if value == "-":
            self.fail("a result cannot go to stdout: name a file (./- is one of that name).", param, ctx)
        if not value or "\0" in value:
            self.fail("the name is empty: name a file.", param, ctx)
        return named(value)
