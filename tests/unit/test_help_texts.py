"""`--help` of every command reads alike: options under headings, each explained, and right examples at the end."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from tmd_engines.command.help import OTHERS, WIDTH, Grouped, GroupedGroup

PROGRAMS = {
    "tmd-run": "tmd_runtime.command.cli:command",
    "tmd-engine": "tmd_engines.command.cli:main",
    "tmd-export": "tmd_export.cli:command",
    "tmd-distill": "tmd_ref.distill.cli:main",
    "tmd-bench": "tmd_bench.cli:command",
    "tmd-serve": "tmd_serve.command.cli:command",
}
MANY = 8
"""From so many options on, a command has headings for them."""


def load(program: str) -> click.Command:
    module, _, name = PROGRAMS[program].partition(":")
    found = getattr(import_module(module), name)
    assert isinstance(found, click.Command)
    return found


def commands(program: str) -> Iterator[tuple[str, click.Command]]:
    """A program and its commands, by what a user types."""

    def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            for part, inner in command.commands.items():
                yield from walk(f"{name} {part}", inner)

    return walk(program, load(program))


ALL = [pytest.param(name, command, id=name) for program in PROGRAMS for name, command in commands(program)]


def help_of(name: str) -> str:
    program, *parts = name.split()
    ran = CliRunner().invoke(load(program), [*parts, "--help"], prog_name=program, terminal_width=WIDTH)
    assert ran.exit_code == 0, ran.output
    return ran.output


def examples(text: str) -> list[str]:
    """The command lines under the last heading; one may go on behind a backslash, and end in a comment."""
    _, _, last = text.rpartition("Examples:\n")
    return [" ".join(line.split()) for line in last.replace("\\\n", " ").strip().splitlines()]


def visible_options(command: click.Command) -> list[click.Option]:
    found = [param for param in command.params if isinstance(param, click.Option)]
    return [option for option in found if not option.hidden and "--help" not in option.opts]


@pytest.mark.parametrize(("name", "command"), ALL)
def test_every_option_is_explained_in_sentences(name: str, command: click.Command) -> None:
    for option in visible_options(command):
        assert option.help, option.opts
        text = re.sub(r"\s*\[default: .*\]$", "", option.help)
        assert text[-1] in ".?" and text[0].isupper(), f"{name} {option.opts[0]}: {option.help}"
        assert "efault:" not in text, f"{name} {option.opts[0]}: a default stands in brackets at the end"
        if not option.is_flag and not isinstance(option.type, click.Choice):
            assert option.metavar, f"{name} {option.opts[0]} shows {option.type.name} in place of a word"


@pytest.mark.parametrize(("name", "command"), ALL)
def test_many_options_stand_under_headings(name: str, command: click.Command) -> None:
    shown = [option for option in visible_options(command) if option.name != "version"]
    if len(shown) <= MANY:
        return
    assert isinstance(command, Grouped | GroupedGroup), f"{name} has {len(shown)} options in one list"
    named = [param for names in command.groups.values() for param in names]
    assert sorted(named) == sorted(str(option.name) for option in shown), "each in one place"
    text = help_of(name)
    titles = re.findall(r"^(\S[^:\n]*):$", text, re.MULTILINE)
    assert titles[: len(command.groups) + 1] == [*command.groups, OTHERS]


@pytest.mark.parametrize(("name", "command"), ALL)
def test_help_ends_in_exit_codes_and_examples(name: str, command: click.Command) -> None:
    text = help_of(name)
    assert re.search(r"^  Exit codes: 0 done, 1 .*, 2 bad usage.*, 130 stopped by Ctrl-C", text, re.MULTILINE)
    assert text.index("Exit codes:") < text.index("Examples:")
    assert examples(text) and all(line.startswith(name.split()[0]) for line in examples(text))
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize(("name", "command"), ALL)
def test_commands_are_listed_by_one_whole_sentence(name: str, command: click.Command) -> None:
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            assert inner.get_short_help_str(limit=90).endswith("."), f"{name} {inner.name}"


@pytest.mark.parametrize(("name", "command"), ALL)
def test_every_example_names_commands_options_and_choices_that_are_there(name: str, command: click.Command) -> None:
    for line in examples(help_of(name)):
        words = shlex.split(line.partition(" #")[0].partition(" > ")[0].partition(" | ")[0])
        found, words = load(words[0]), words[1:]
        while isinstance(found, click.Group) and words and not words[0].startswith("-"):
            found, words = found.commands[words[0]], words[1:]
        ctx = click.Context(found, info_name=name)
        values, rest, _ = found.make_parser(ctx).parse_args(words)
        assert not rest, line
        for option in found.params:
            if isinstance(option.type, click.Choice) and option.name in values and not option.multiple:
                option.type.convert(values[option.name], option, ctx)
