"""Kinds of values that options of several commands take, with errors in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

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


class BundleFolder(click.Path):
    """A bundle: a folder, or `builtin:NAME`. A shell offers both."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        from .built_in import PREFIX, built_in_bundles

        names = [f"{PREFIX}{name}" for name in built_in_bundles()]
        return [CompletionItem(incomplete, type="dir"), *plain(names, incomplete)]


def plain(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """What a shell offers of `names` to somebody who has typed `incomplete`."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def offered(*names: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """For `shell_complete` of an option: words that a shell offers, beside which others may be right."""
    return lambda ctx, param, incomplete: plain(names, incomplete)


def offered_list(*names: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """The same for an option that takes several words with commas between them: those that are not there yet."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, _ = incomplete.rpartition(",")
        rest = [name for name in names if name not in before.split(",")]
        return plain((f"{before}{comma}{name}" for name in rest), incomplete)

    return complete


def version_option(program: str) -> Callable[[Any], Any]:
    """`--version` of one of the commands."""

    def show(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if not wanted or ctx.resilient_parsing:
            return
        from importlib.metadata import PackageNotFoundError, version

        try:
            click.echo(f"{program} {version('tmd-runtime')}")
        except PackageNotFoundError:
            click.echo(f"{program} (not installed, run from its sources)")
        ctx.exit()

    return click.option(
        "--version", is_flag=True, callback=show, expose_value=False, is_eager=True, help="Print the version."
    )
