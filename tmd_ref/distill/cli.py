"""`tmd-distill`: trains the built-in model, stage by stage. Heavy libraries are loaded when a stage starts."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tmd")
def main() -> None:
    """Train and distil models for tmd-run."""


@main.group()
def tiny() -> None:
    """The built-in model, from rendered scenes to a TMD student.

    Stages in order: text, vae, data, decoder, teacher, stage1, pack, evaluate.
    """


def _options(command):
    command = click.option("--run", type=click.Path(path_type=Path), default=Path("runs/tiny"), show_default=True,
                           help="Folder for checkpoints, data and results.")(command)  # fmt: skip
    return click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads; default: all cores.")(
        command
    )


def _stage(name: str, text: str):
    @tiny.command(name, help=text)
    @_options
    def command(run: Path, threads: int | None) -> None:
        try:
            import torch
        except ImportError:
            click.echo("tmd-distill needs torch, which is not installed: pip install 'tmd[export]'.", err=True)
            sys.exit(1)
        from tmd_ref.distill import tiny as recipe
        from tmd_ref.distill.trainer import TrainingError

        if threads:
            torch.set_num_threads(threads)
        try:
            getattr(recipe, name)(run, click.echo)
        except (TrainingError, FileNotFoundError) as error:
            click.echo(f"tmd-distill: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo(f"stopped; run the same command again to resume from the last checkpoint in {run}", err=True)
            sys.exit(130)


_stage("text", "Train the tokenizer and the small UMT5 encoder on captions.")
_stage("vae", "Train the small Wan VAE on windows of rendered clips.")
_stage("data", "Render training scenes and encode them and their captions.")
_stage("decoder", "Train the VAE's decoder further in its fixed latent space; may run beside the teacher.")
_stage("teacher", "Train the flow-matching teacher.")
_stage("stage1", "Distil the teacher into a TMD student by TM-MeanFlow.")
_stage("evaluate", "Measure teacher and student on held-out captions; write a table and a contact sheet.")
_stage("pack", "Write the trained weights as safetensors, ready for tmd-export --checkpoint.")
_stage("all", "All stages, one after the other.")
