"""The prompt loop of `tmd-run`: prompts one after the other, and a few settings between them."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from tmd_engines.command.options import Size
from tmd_engines.command.screen import tell

from .failures import failures
from .options import Whole

if TYPE_CHECKING:
    from tmd_engines.command.signals import Ending

    from ..pipeline import Pipeline
    from .job import Job

HELP = """\
TEXT          makes a video of it
:seed N       the seed of the runs to come; :seed alone: a new one for each
:size WxH     their width and height in pixels; :size alone: the model's
:steps M      their steps; :steps alone: the model's
:help         this text
An empty line, or Ctrl-D, ends. Ctrl-C stops a run, twice ends the program."""
_SETTINGS: dict[str, click.ParamType] = {"seed": Whole(0, 2**32 - 1), "size": Size(), "steps": Whole(1)}


def ask(job: Job, pipeline: Pipeline, ending: Ending | None) -> None:
    """Asks until there is no more answer. A run that fails or is stopped does not end it."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() history and editing where there is one)
    tell("Describe a video and press Enter. An empty line ends, Ctrl-C stops a run, :help says more.")
    while True:
        if ending is not None:
            ending.calm()
            ending.patient = False
        try:
            text = input("prompt> ").strip()
        except EOFError:
            tell("")
            return
        if not text:
            return
        if ending is not None:
            ending.patient = True
        with failures(lambda message, _: tell(f"tmd-run: {message}")):
            if text.startswith(":"):
                _set(job, pipeline, text[1:])
            else:
                job.run(pipeline, text)


def _set(job: Job, pipeline: Pipeline, text: str) -> None:
    """Carries out `:name value`."""
    name, _, value = text.partition(" ")
    if name == "help":
        tell(HELP)
    elif name not in _SETTINGS:
        tell(f"tmd-run: there is no :{name}. :help lists what there is.")
    else:
        try:
            found: Any = _SETTINGS[name].convert(value.strip(), None, None) if value.strip() else None
        except click.BadParameter as error:
            tell(f"tmd-run: {error.message}")
            return
        wishes = {**job.wishes, name: found}
        pipeline.settings(**wishes)  # raises for what the model does not do
        job.wishes = wishes
        tell(f"{name}: {value.strip() or 'left to the model' if name != 'seed' else value.strip() or 'random'}")
