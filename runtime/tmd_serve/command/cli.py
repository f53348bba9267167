"""`tmd-serve`: starts the server, and keeps its API keys.

The imports at the top are light, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from tmd_engines.command.help import SETTINGS, GroupedGroup
from tmd_engines.command.options import Size, offered, version_option
from tmd_engines.command.program import BAD_USAGE, FAILED, ending_of_program, run_program
from tmd_engines.command.screen import say, tell
from tmd_engines.registry import engine_names
from tmd_runtime.command.failures import failures
from tmd_runtime.command.options import Number, Whole
from tmd_runtime.memory import MODES

from .options import Amount, Named

DEFAULT_PORT = 8000


def _place(command: Any) -> Any:
    """The options that say where jobs and keys are kept."""
    command = click.option(
        "--database",
        envvar="TMD_DATABASE",
        metavar="URL",
        help="Such as postgresql://USER@HOST/NAME, for several machines.  [default: a SQLite file in --data]",
    )(command)
    return click.option(
        "--data",
        type=click.Path(path_type=Path),
        envvar="TMD_DATA",
        metavar="DIR",
        help="Jobs and their files.  [default: tmd in $XDG_DATA_HOME or ~/.local/share]",
    )(command)


_GROUPS = {
    "What is served": ("bundles", "engine", "device", "threads", "memory", "memory_budget", "max_loaded"),
    "Who may ask": ("host", "port", "require_key", "hosts", "origins"),
    "What one request may ask for": (
        *("max_waiting", "max_size", "max_frames", "max_steps", "max_seconds", "max_upload"),
    ),
    "What is kept": ("data", "database", "keep", "keep_bytes"),
    "How jobs are run": ("attempts", "lease", "grace"),
    "Reports": ("log_level",),
}
_EXIT_CODES = """\
\b
Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped by Ctrl-C (129 by SIGHUP,
143 by SIGTERM).

\b
Examples:
"""


@click.group(
    "tmd-serve",
    cls=GroupedGroup,
    groups=_GROUPS,
    context_settings=SETTINGS,
    invoke_without_command=True,
    epilog="""\
\b
Exit codes: 0 done, 1 it failed, 2 bad usage, 130 stopped by Ctrl-C a second time
(143 by SIGTERM). A first signal ends the server with 0: the running job ends
within --grace seconds, or is queued again. A second one ends the process at once,
and nothing that was accepted is lost.

\b
Examples:
  tmd-serve                                 # the built-in model at http://127.0.0.1:8000
  tmd-serve --bundle wan=/models/wan --bundle builtin:tim-tiny
  tmd-serve keys add laptop                 # prints a key, once
  tmd-serve --host 0.0.0.0                  # on all interfaces; every request needs a key""",
)
@click.option(
    "--bundle",
    "bundles",
    type=Named(),
    multiple=True,
    metavar="[NAME=]DIR",
    help="A model to serve, several times for several; the first one is what requests get that name none.  "
    "[default: builtin:tiny]",
)
@_place
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    metavar="ADDRESS",
    help="Where to listen; not on a loopback address, every request needs an API key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    metavar="N",
    help="Where to listen; 0: any free port.",
)
@click.option("--require-key", is_flag=True, help="Ask for an API key on a loopback address as well.")
@click.option(
    "--allow-host", "hosts", multiple=True, metavar="NAME", help="Another name under which the server is reached."
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page of another place that may use the server, such as https://example.org.",
)
@click.option("--max-waiting", type=Whole(1), default=32, show_default=True, metavar="N", help="Jobs in the queue.")
@click.option(
    "--max-size",
    type=Size(),
    default="1280x720",
    show_default=True,
    metavar="WxH",
    help="Pixels of a frame, in any shape.",
)
@click.option("--max-frames", type=Whole(1), default=161, show_default=True, metavar="N", help="Frames of a video.")
@click.option("--max-steps", type=Whole(1), default=100, show_default=True, metavar="N", help="Outer steps of a run.")
@click.option(
    "--max-seconds",
    type=Number(1, 1e6),
    default=3600.0,
    show_default=True,
    metavar="S",
    help="Estimated time of one run.",
)
@click.option("--max-upload", type=Amount(), default="20M", show_default=True, metavar="BYTES", help="Of a picture.")
@click.option(
    "--keep", type=Number(0.001, 36500), default=7.0, show_default=True, metavar="DAYS", help="How long results stay."
)
@click.option(
    "--keep-bytes",
    type=Amount(),
    default="10G",
    show_default=True,
    metavar="BYTES",
    help="Of all results; oldest out first.",
)
@click.option(
    "--attempts", type=Whole(1, 1000), default=3, show_default=True, metavar="N", help="How often a job is begun."
)
@click.option(
    "--lease",
    type=Number(1, 3600),
    default=30.0,
    show_default=True,
    metavar="S",
    help="After so long without a sign of life another server of the same database takes a job over.",
)
@click.option(
    "--grace",
    type=Number(0, 86400),
    default=30.0,
    show_default=True,
    metavar="S",
    help="Time to end the running job in.",
)
@click.option("--engine", type=click.Choice(engine_names()), default="auto", show_default=True, help="As in tmd-run.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="D",
    shell_complete=offered("auto", "cpu", "cuda"),
    help="As in tmd-run.",
)
@click.option("--threads", type=Whole(1, 1024), metavar="T", help="CPU threads, as in tmd-run.")
@click.option("--memory", type=click.Choice(MODES), default="auto", show_default=True, help="As in tmd-run.")
@click.option(
    "--memory-budget",
    type=Amount(),
    metavar="BYTES",
    help="For all loaded models together.  [default: what is free at the start]",
)
@click.option(
    "--max-loaded", type=Whole(1), metavar="N", help="Loaded models at a time.  [default: by --memory-budget]"
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning"]),
    default="info",
    show_default=True,
    help="Lines of JSON on stderr, from this level on.",
)
@version_option("tmd-serve")
@click.pass_context
def command(ctx: click.Context, data: Path | None, database: str | None, **options: Any) -> None:
    """Serve few-step models over HTTP: OpenAI's videos API and a page, with jobs that survive a crash."""
    if ctx.invoked_subcommand is not None:
        ctx.meta["place"] = data, database
        return
    ending = ending_of_program()
    if ending is not None:
        ending.patient = True  # the server itself ends by the first signal
    with _explained():
        from .serve import serve

        serve(_folder(data), database, **options)
    if ending is not None:
        ending.calm()


@command.group(
    "keys",
    context_settings=SETTINGS,
    short_help="Keep the API keys.",
    epilog=f"""{_EXIT_CODES}\
  tmd-serve keys add laptop
  tmd-serve keys list
  tmd-serve keys remove laptop""",
)
def keys() -> None:
    """API keys, of which the database keeps only hashes."""


@keys.command("add", context_settings=SETTINGS, epilog=f"{_EXIT_CODES}  tmd-serve keys add laptop")
@click.argument("name")
@_place
def add(name: str, data: Path | None, database: str | None) -> None:
    """Make a key and print it, this once."""
    if not 1 <= len(name) <= 200 or not name.isprintable():
        raise click.UsageError("a name has 1 to 200 printable characters.")
    with _keys(data, database) as store:
        try:
            key = store.add(name)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        try:
            say(key)
        except BaseException:  # nobody has seen it
            store.remove(name)
            raise


@keys.command("list", context_settings=SETTINGS, epilog=f"{_EXIT_CODES}  tmd-serve keys list")
@_place
def list_(data: Path | None, database: str | None) -> None:
    """Names, and when they were made."""
    from datetime import datetime

    with _keys(data, database) as store:
        for key in store.list():
            say(f"{datetime.fromtimestamp(key.created_at):%Y-%m-%d %H:%M}  {key.id}  {key.name}")


@keys.command("remove", context_settings=SETTINGS, epilog=f"{_EXIT_CODES}  tmd-serve keys remove laptop")
@click.argument("name")
@_place
def remove(name: str, data: Path | None, database: str | None) -> None:
    """Forget a key: it is refused from now on."""
    with _keys(data, database) as store:
        if not store.remove(name):
            raise click.UsageError(f"there is no key {name!r}: see tmd-serve keys list.")


@contextmanager
def _keys(data: Path | None, database: str | None) -> Iterator[Any]:
    above = click.get_current_context().meta.get("place", (None, None))
    with _explained():
        from ..store.database import Database
        from ..store.sql_keys import SqlKeys
        from .serve import open_database

        opened: Database = open_database(_folder(data or above[0]), database or above[1])
        try:
            yield SqlKeys(opened)
        finally:
            opened.close()


def _folder(data: Path | None) -> Path:
    if data is not None:
        return data
    home = os.environ.get("XDG_DATA_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "share") / "tmd"


@contextmanager
def _explained() -> Iterator[None]:
    """Everything that can go wrong for a reason outside this program ends in a sentence and an exit code."""

    def fail(message: str, code: int) -> NoReturn:
        tell(f"tmd-serve: {message}")
        sys.exit(code)

    with failures(fail):
        try:
            yield
        except click.UsageError:
            raise
        except ImportError as error:
            fail(f"the server's packages are missing ({error.name}): pip install '.[serve]' in tmd's checkout", FAILED)
        except Exception as error:
            from ..store.database import DatabaseFailure

            if not isinstance(error, DatabaseFailure):
                raise
            fail(str(error), BAD_USAGE)


def main() -> NoReturn:
    """Runs `tmd-serve`."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run_program(command, "tmd-serve")
