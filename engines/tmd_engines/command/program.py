"""How every command of this project begins and ends: its streams, its signals, and what it says of bad usage.

What is not here: what a command does, and which of its errors are whose fault.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import click

from .. import unfinished
from .screen import of_file, repair_streams, silence, tell
from .signals import Ending

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130


def run_program(command: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs `command` as the program `name`, whose object in click's context is then an `Ending`.

    A signal ends it within half a second with 128 and its number, without a traceback, and what it was making is
    removed.
    """
    repair_streams()
    if f"_{name}_COMPLETE".replace("-", "_").upper() in os.environ:
        from .completion import install

        install()
    ending = Ending(lambda: tell(f"{name}: stopped."))
    try:
        command.main(arguments, prog_name=name, standalone_mode=False, obj=ending)
    except click.ClickException as error:
        tell(_usage(error, name) if ending.code is None else f"{name}: stopped.")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        tell(f"{name}: stopped.")
        sys.exit(INTERRUPTED)
    except OSError as error:
        if error.filename is not None:
            tell(f"{name}: {of_file(error)}")
            sys.exit(FAILED)
        # --help and --version, where nobody reads.
        silence(1, "stdout")
        tell(f"{name}: cannot write to stdout: {(error.strerror or str(error)).lower()}.")
        sys.exit(FAILED)
    finally:
        # What follows is Python's own shutdown: a second Ctrl-C there would print a traceback, and after a first one
        # nobody waits for engines to give their memory back.
        ending.over()
    sys.exit(0)


def ending_of_program() -> Ending | None:
    """Inside a command that `run_program` runs: its watch over signals. None: somebody else runs it."""
    context = click.get_current_context(silent=True)
    found = None if context is None else context.obj
    return found if isinstance(found, Ending) else None


def verdict(message: str, code: int) -> tuple[str, int]:
    """What to say of a failure, and the exit code: those of the signal if there was one, whatever it broke."""
    ending = ending_of_program()
    return (message, code) if ending is None or ending.code is None else ("stopped.", ending.code)


def sweep(name: str, places: Iterable[Path], quiet: bool = False) -> None:
    """Removes what programs that were killed have left unfinished in these folders, and says so."""
    for place in sorted(place for place in set(places) if os.path.isdir(place)):
        removed = unfinished.sweep(place)
        if removed and not quiet:
            names = ", ".join(removed[:3]) + (", ..." if len(removed) > 3 else "")
            tell(f"{name}: note: removed from {place} what a run that was killed had left unfinished: {names}")


def _usage(error: click.ClickException, name: str) -> str:
    """What click prints of bad usage, as a text."""
    context = getattr(error, "ctx", None)
    lines = []
    if context is not None:
        lines = [context.get_usage(), f"Try '{context.command_path} {context.help_option_names[0]}' for help.", ""]
    return "\n".join([*lines, f"Error: {error.format_message()}"])
