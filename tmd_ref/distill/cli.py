"""`tmd-distill`: trains and distils models, command by command. Heavy libraries are loaded when a command starts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"tmd-distill {version('tmd-runtime')}")
    except PackageNotFoundError:
        click.echo("tmd-distill (not installed, run from its sources)")
    ctx.exit()


_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
_EXIT_CODES = """\
\b
Exit codes: 0 done, 1 failed, 2 bad usage or settings, 130 stopped by Ctrl-C (129
by SIGHUP, 143 by SIGTERM). A run that was stopped goes on from its checkpoint.

\b
Examples:
"""


@click.group(
    context_settings=_SETTINGS,
    epilog=f"""{_EXIT_CODES}\
  tmd-distill tiny all
  tmd-distill plan --config wan14b --gpus 64
  tmd-distill prepare --config wan1.3b --videos clips.jsonl --run runs/wan
  tmd-distill stage1 --config wan1.3b --run runs/wan --device cuda
  tmd-distill stage2 --config wan1.3b --run runs/wan --device cuda --set stage2.steps=100
  tmd-distill evaluate --config wan1.3b --run runs/wan --device cuda""",
)
@click.option(
    "--version", is_flag=True, callback=_print_version, expose_value=False, is_eager=True, help="Print the version."
)
def main() -> None:
    """Train and distil models for tmd-run.

    In order: prepare, teacher (only for a model without one), stage1, stage2, evaluate. The built-in model also needs
    `tiny text`, `tiny vae` before and `tiny decoder`, `tiny pack` after; `tiny all` runs everything. A Transition Model
    (config tim-tiny) takes prepare, tim, evaluate, pack. With several GPUs:
    torchrun --nproc-per-node 8 -m -- tmd_ref.distill stage1 --config wan1.3b --device cuda.
    """


def _guarded(run: Path, action: Callable[[], None]) -> None:
    """Errors that a user can do something about end in one line, Ctrl-C in a hint."""
    try:
        import torch  # noqa: F401
    except ImportError:
        click.echo("tmd-distill needs torch: pip install '.[export]' in tmd's checkout.", err=True)
        sys.exit(1)
    from tmd_ref.distill.config import ConfigError
    from tmd_ref.distill.program import Stopped
    from tmd_ref.distill.trainer import TrainingError

    try:
        action()
    except ConfigError as error:
        click.echo(f"tmd-distill: {error}", err=True)
        sys.exit(2)
    except (TrainingError, FileNotFoundError, ValueError) as error:
        click.echo(f"tmd-distill: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt as stop:
        click.echo(f"stopped; run the same command again to resume from the last checkpoint in {run}", err=True)
        sys.exit(stop.code if isinstance(stop, Stopped) else 130)


def _configs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """What a shell offers for `--config`: files, and the packaged ones."""
    from click.shell_completion import CompletionItem

    packaged = sorted(path.stem for path in (Path(__file__).parent / "configs").glob("*.yaml"))
    names = [CompletionItem(name) for name in packaged if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="file"), *names]


_RUN = click.option("--run", type=click.Path(path_type=Path), default=Path("runs/tiny"), show_default=True,
                    metavar="DIR", help="Folder for checkpoints, data and results.")  # fmt: skip
_THREADS = click.option("--threads", type=click.IntRange(1), default=None, metavar="T",
                        help="CPU threads.  [default: all cores]")  # fmt: skip
_CONFIG = click.option("--config", "config_name", required=True, metavar="NAME|FILE", shell_complete=_configs,
                       help="Settings: tiny, wan1.3b, wan14b, tim-tiny, tim-tiny-flow, tim-tiny-meanflow, or a YAML "
                            "file.")  # fmt: skip
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE",
                    help="Change one setting, such as stage2.steps=100; may be repeated.")  # fmt: skip


def _command(name: str, text: str, short: str, config: str, *extra: Callable, more: str = "") -> None:
    def command(config_name: str, overrides: tuple[str, ...], run: Path, inputs: Path | None, device: str,
                threads: int | None, **options: Any) -> None:  # fmt: skip
        def action() -> None:
            import torch

            from tmd_ref.distill import recipe, tim_recipe
            from tmd_ref.distill.config import ConfigError
            from tmd_ref.distill.parallel import World
            from tmd_ref.distill.tim_config import TiMRun, load_any

            config = load_any(config_name, overrides)
            of_tim = isinstance(config, TiMRun)
            stage = getattr(tim_recipe if of_tim else recipe, name, None)
            if stage is None:
                other = "prepare, tim, evaluate, pack" if of_tim else "prepare, teacher, stage1, stage2, evaluate"
                raise ConfigError(f"{config_name} has no {name}: it goes with {other}.")
            if threads:
                torch.set_num_threads(threads)
            world = World.start(device)
            report = click.echo if world.first else _silent
            try:
                job = tim_recipe.TiMJob if of_tim else recipe.Job
                stage(job(config, run, inputs, world, report), **options)  # type: ignore[arg-type]
            finally:
                world.stop()

        _guarded(run, action)

    decorated: Callable = command
    for option in (
        *extra,
        _THREADS,
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
                     help="Where it computes."),
        click.option("--inputs", type=click.Path(path_type=Path, file_okay=False), default=None, metavar="DIR",
                     help="Another run's folder, where data and weights are looked for that --run has not."),
        _RUN, _SET, _CONFIG,
    ):  # fmt: skip
        decorated = option(decorated)
    example = f"  tmd-distill {name} --config {config}{more} --run runs/{config}"
    main.command(name, help=text, short_help=short, context_settings=_SETTINGS, epilog=_EXIT_CODES + example)(decorated)


def _silent(line: str) -> None:
    """Only the first of several processes talks."""


_command("prepare", "Encode videos and captions, or rendered scenes, into shards of latents.",
         "Encode videos or rendered scenes into shards of latents.", "wan1.3b",
         click.option("--videos", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
                      help="JSON lines of {video, caption}; without it, scenes are rendered."),
         more=" --videos clips.jsonl")  # fmt: skip
_command("teacher", "Train a flow-matching teacher from scratch.", "Train a flow-matching teacher.", "tiny")
_command("stage1", "Pre-train the generator: TM-MeanFlow, plain TM, or the baseline's warm-up.",
         "Pre-train the generator by TM-MeanFlow.", "wan1.3b")  # fmt: skip
_command("stage2", "Distil by DMD2-v, the flow head unrolled.", "Distil by DMD2-v.", "wan1.3b")
_command("tim", "Train a Transition Model, or the same network by flow matching or MeanFlow.",
         "Train a Transition Model.", "tim-tiny")  # fmt: skip
_command("pack", "Write a trained Transition Model and its helpers in float16, ready for tmd-export --checkpoint.",
         "Write a trained Transition Model for tmd-export.", "tim-tiny")  # fmt: skip
_command("evaluate", "Measure what was trained on held-out captions; write a table and a contact sheet.",
         "Measure what was trained on held-out captions.", "tiny",
         click.option("--videos", type=click.Path(path_type=Path, dir_okay=False), default=None, metavar="FILE",
                      help="Held-out videos and captions as for prepare; clips are written for VBench too."),
         click.option("--clips", type=click.IntRange(1), default=1, show_default=True, metavar="N",
                      help="Clips of each caption with --videos; VBench wants 5."))  # fmt: skip


@main.command(
    context_settings=_SETTINGS,
    short_help="Print the memory and the work of each stage.",
    epilog=f"{_EXIT_CODES}  tmd-distill plan --config wan14b --gpus 64",
)
@_CONFIG
@_SET
@click.option("--gpus", type=click.IntRange(1), default=8, show_default=True, metavar="N", help="GPUs to plan with.")
def plan(config_name: str, overrides: tuple[str, ...], gpus: int) -> None:
    """Print the memory per GPU and the work of each stage, without running anything."""

    def action() -> None:
        from tmd_ref.distill.budget import describe
        from tmd_ref.distill.config import ConfigError
        from tmd_ref.distill.tim_config import TiMRun, load_any

        config = load_any(config_name, overrides)
        if isinstance(config, TiMRun):
            raise ConfigError(f"{config_name} trains a Transition Model, of which there is no plan: name a TMD config.")
        click.echo(describe(config, gpus))

    _guarded(Path(), action)


@main.group(
    context_settings=_SETTINGS,
    short_help="The built-in model, from rendered scenes to a student.",
    epilog=f"{_EXIT_CODES}  tmd-distill tiny all\n  tmd-distill tiny stage2 --run runs/mine --threads 8",
)
def tiny() -> None:
    """The built-in model, from rendered scenes to a packed TMD student.

    Stages in order: text, vae, data, decoder, teacher, stage1, stage2, pack, evaluate.
    """


def _stage(name: str, text: str) -> None:
    short = text.partition(":")[0].partition(";")[0].rstrip(".") + "."
    epilog = f"{_EXIT_CODES}  tmd-distill tiny {name} --run runs/mine"

    @tiny.command(name, help=text, short_help=short, context_settings=_SETTINGS, epilog=epilog)
    @_THREADS
    @_RUN
    def command(run: Path, threads: int | None) -> None:
        def action() -> None:
            import torch

            from tmd_ref.distill import tiny as stages

            if threads:
                torch.set_num_threads(threads)
            getattr(stages, name)(run, click.echo)

        _guarded(run, action)


_stage("text", "Train the tokenizer and the small UMT5 encoder on captions.")
_stage("vae", "Train the small Wan VAE on windows of rendered clips.")
_stage("data", "Render training scenes and encode them and their captions: prepare --config tiny.")
_stage("decoder", "Train the VAE's decoder further in its fixed latent space; may run beside the teacher.")
_stage("teacher", "Train the flow-matching teacher: teacher --config tiny.")
_stage("stage1", "Distil the teacher into a TMD student by TM-MeanFlow: stage1 --config tiny.")
_stage("stage2", "Train the student further by DMD2-v with rollout: stage2 --config tiny.")
_stage("evaluate", "Measure teacher and student as packed.")
_stage("pack", "Write the trained weights as safetensors, ready for tmd-export --checkpoint.")
_stage("all", "All stages, one after the other.")
