"""What `--help` looks like in every command: options under headings, in the order in which questions come up.

Behind them stands the epilog: what is printed, exit codes, and examples at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

WIDTH = 100
"""Columns of a help text at most."""
SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": WIDTH}
"""`context_settings` of every command."""
OTHERS = "Other options"


class Grouped(click.Command):
    """A command whose help has its options under headings.

    `groups` maps a heading to names of parameters, as the function has them. What none of them names stands under
    `OTHERS`, at the end, with `--help`.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **more: Any) -> None:
        super().__init__(*args, **more)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options, each under its heading."""
        _write(self, self.groups, ctx, formatter)


class GroupedGroup(click.Group):
    """The same for a command that has commands of its own, which stand behind its options."""

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **more: Any) -> None:
        super().__init__(*args, **more)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options, each under its heading, and the commands."""
        _write(self, self.groups, ctx, formatter)
        self.format_commands(ctx, formatter)


def _write(
    command: click.Command, groups: Mapping[str, Sequence[str]], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    heading = {name: title for title, names in groups.items() for name in names}
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (*groups, OTHERS)}
    for param in command.get_params(ctx):
        row = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
        if row is not None:
            rows[heading.get(param.name or "", OTHERS)].append(row)
    for title, found in rows.items():
        if found:
            with formatter.section(title):
                formatter.write_dl(found)
