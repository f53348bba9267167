"""Kinds of values that options of several commands take, with errors in words."""

from __future__ import annotations

import re
from typing import Any

import click

MAX_SIDE = 65_536
"""Pixels; no manifest allows more."""


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"\s*([0-9]+)\s*[xX×]\s*([0-9]+)\s*", value)
        if not match:
            self.fail(f"{value[:40]!r} is no size: write width x height in pixels, such as 64x64.", param, ctx)
        # Length first: Python refuses to read numbers of thousands of digits, with an error of its own.
        if any(len(side) > 40 or int(side) > MAX_SIDE for side in match.groups()):
            self.fail(f"{value[:40]!r} is too large: a video has at most {MAX_SIDE} pixels a side.", param, ctx)
        return int(match[1]), int(match[2])
