"""`tmd-run`: a prompt on the command line, a video in a file.

The imports at the top are light, so that `--help` answers at once; the rest comes in when there is something to run.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import click

from tmd_engines.command.help import SETTINGS, Grouped
from tmd_engines.command.options import BundleFolder, Size, offered, version_option
from tmd_engines.command.program import ending_of_program, run_program, verdict
from tmd_engines.command.screen import say, tell
from tmd_engines.registry import engine_names
from tmd_engines.utf8 import json_text

from ..memory import MODES
from ..settings import MAX_FPS
from .failures import INTERRUPTED, check_address_space, failures
from .job import Job
from .options import Number, Output, Schedule, Whole
from .prompts import read_prompts

_GROUPS = {
    "What to show": ("prompts", "prompt_file", "negative_prompt", "label"),
    "Starting from a picture": ("image", "init_latents", "strength"),
    "How it is made": ("seed", "steps", "inner_steps", "guidance", "shift", "schedule", "deadline", "rho"),
    "The file": ("out", "frames", "size", "fps", "preview"),
    "Model and machine": ("bundle", "engine", "device", "threads", "memory", "plans"),
    "Stage by stage": ("save_embeds", "embeds", "save_latents", "latents"),
    "Reports": ("as_json", "quiet"),
}


@click.command(
    "tmd-run",
    cls=Grouped,
    groups=_GROUPS,
    context_settings=SETTINGS,
    epilog="""\
\b
Output:
--json prints one document with the keys seed, prompt, steps, inner_steps, nfe,
frames, width, height, fps, stage_seconds, total_seconds, out, warnings, rule,
guidance, memory (all or low), embeds, latents and preview (files written, or
null), times (of the steps, from noise to data; empty for a TMD student), rho,
threads (null: the engine's choice), estimated_seconds (null: unknown).
A bundle that has no part to go on after a saved file ends there: out is null.
With --prompt-file or several --prompt it is a line for each, printed when it is
done. After a failure the document, or the last line, is {"error": MESSAGE}. In
stage_seconds, load is what only the first run pays, and file (encoding) goes on
beside decode.

\b
Exit codes: 0 done, 1 the run failed, 2 bad usage, 130 stopped by Ctrl-C (129 by
SIGHUP, 143 by SIGTERM). A second Ctrl-C ends the process at once.
A file appears under its name only when it is complete.

\b
Examples:
  tmd-run --prompt "a red circle moving right on a black background"
  tmd-run --prompt "a blue star spinning" --seed 7 --steps 2 --out star.gif
  tmd-run --prompt-file prompts.txt --bundle my-bundle --json > runs.jsonl
  tmd-run --embeds cat.safetensors --bundle edge-bundle --save-latents cat-latents.safetensors
  tmd-run --latents cat-latents.safetensors --bundle my-bundle --fps 16 --out cat.mp4
  tmd-run                              # asks for prompts and keeps the model loaded""",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to show. May be given several times.")
@click.option(
    "--prompt-file",
    type=click.File("rb"),
    metavar="FILE",
    help="One prompt per line, UTF-8, without lines that begin with #; - reads stdin.",
)
@click.option(
    "--bundle",
    type=BundleFolder(path_type=Path),
    metavar="DIR",
    help="Exported model; builtin:tim-tiny is one of stills.  [default: builtin:tiny]",
)
@click.option(
    "--out",
    type=Output(),
    metavar="FILE",
    help="Ends in .mp4, .webm, .gif or .png (contact sheet; a picture if --frames is 1); without an ending, or with a "
    "slash behind it: a folder of PNG frames. Several prompts get NAME-001, NAME-002, ...  "
    "[default: PROMPT-SEED.mp4 in this folder, .png for a model of stills]",
)
@click.option(
    "--seed", type=Whole(0, 2**32 - 1), metavar="N", help="Same seed, same video.  [default: random, printed]"
)
@click.option("--steps", type=Whole(1), metavar="M", help="Outer steps, one backbone pass each.")
@click.option("--inner-steps", type=Whole(1), metavar="N", help="Flow-head passes per outer step.")
@click.option(
    "--guidance",
    type=Number(0, 1000),
    metavar="G",
    help="Strength of classifier-free guidance; 1: none, half the time.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What guidance steers away from.")
@click.option(
    "--shift", type=Number(1, 1000), metavar="S", help="Warp of the times of a model without a fixed list of them."
)
@click.option(
    "--schedule",
    type=Schedule(),
    metavar="T,T,...",
    help="Times of a Transition Model or flow map in the place of --steps, falling from 1 to 0.",
)
@click.option(
    "--deadline",
    type=Number(0, 86400),
    metavar="SECONDS",
    help="Time for the steps of a Transition Model or flow map: as many as fit, at most --steps.",
)
@click.option(
    "--rho",
    type=Number(0, 10),
    metavar="R",
    help="Fresh noise in every step of a Transition Model but the first and the last; 0: none. For many steps.",
)
@click.option("--class", "label", type=Whole(0), metavar="N", help="What to draw, for a model of numbered classes.")
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A picture: the first frame of the video (Wan2.2-TI2V-5B), or with --strength what a Transition Model starts "
    "from. PNG, JPEG, WebP, BMP or TIFF. Its middle is scaled to --size; without that it keeps its shape, at about as "
    "many pixels as the model was made for.",
)
@click.option(
    "--init-latents", type=click.Path(path_type=Path), metavar="FILE", help="The same, from a file of --save-latents."
)
@click.option(
    "--strength",
    type=Number(0, 1),
    metavar="S",
    help="How much a Transition Model changes of that picture; 1: everything.",
)
@click.option("--frames", type=Whole(1), metavar="F", help="Length in frames: 1 plus a multiple of 4; 1 is a still.")
@click.option(
    "--size",
    type=Size(),
    metavar="WxH",
    help="Width and height in pixels, multiples of 16 or 32, as the model was made.",
)
@click.option(
    "--fps",
    type=Whole(1, MAX_FPS),
    metavar="N",
    help="Frames per second of the file, with --latents too. Changes no frame.  [default: the model's]",
)
@click.option(
    "--engine", type=click.Choice(engine_names()), default="auto", show_default=True, help="What computes the graphs."
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="D",
    shell_complete=offered("auto", "cpu", "cuda"),
    help="Where: cpu, cuda, or cuda:N for one of several GPUs; auto: a GPU where there is one.",
)
@click.option(
    "--threads",
    type=Whole(1, 1024),
    metavar="T",
    help="CPU threads.  [default: all cores; 2 for small models, so that a seed gives one video everywhere]",
)
@click.option(
    "--memory",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="Keep all graphs loaded, or one stage after the other (low); auto: low if all would not fit.",
)
@click.option(
    "--plans",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Plans that tmd-engine build --out made for --engine. They are code: take them only from whom you trust.",
)
@click.option("--save-embeds", type=Output(), metavar="FILE", help="Also write the prompt's embeddings.")
@click.option(
    "--embeds", type=click.Path(path_type=Path), metavar="FILE", help="Take the prompt from a file of --save-embeds."
)
@click.option("--save-latents", type=Output(), metavar="FILE", help="Also write the latents, before decoding.")
@click.option(
    "--latents", type=click.Path(path_type=Path), metavar="FILE", help="Only decode a file of --save-latents."
)
@click.option(
    "--preview",
    type=Output(),
    metavar="FILE",
    help="Before each step but the last, write what the run would give if it were the last. Changes nothing else.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, everything else on stderr.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors (and JSON with --json).")
@version_option("tmd-run")
def command(
    prompts: tuple[str, ...],
    prompt_file: Any,
    bundle: Path | None,
    out: Path | None,
    engine: str,
    device: str,
    threads: int | None,
    memory: str,
    plans: Path | None,
    embeds: Path | None,
    latents: Path | None,
    save_embeds: Path | None,
    save_latents: Path | None,
    image: Path | None,
    init_latents: Path | None,
    preview: Path | None,
    as_json: bool,
    quiet: bool,
    **wishes: Any,
) -> None:
    """Turn a prompt into a video with an exported few-step model.

    Steps, inner steps, guidance, frames and size default to what the model was made for. Without --prompt in a terminal
    it asks for prompts one after the other and keeps the model loaded. Nothing is downloaded or sent anywhere.
    """
    texts = read_prompts(prompts, prompt_file)
    written = {"save-embeds": save_embeds, "save-latents": save_latents, "preview": preview}
    _check_sources(texts, embeds, latents, written, {**wishes, "image": image, "init_latents": init_latents})
    outputs = {"--out": out, **{f"--{name}": path for name, path in written.items()}}
    inputs = {"--image": image, "--init-latents": init_latents, "--embeds": embeds, "--latents": latents}
    if prompt_file is not None and isinstance(getattr(prompt_file, "name", None), str):  # "-" is a pipe
        inputs["--prompt-file"] = Path(prompt_file.name)
    drawing = wishes["label"] is not None
    asking = not texts and embeds is None and latents is None and not drawing
    _check_names(outputs, inputs, numbered=asking or len(texts) > 1)
    if asking and as_json:
        raise click.UsageError("--json needs a prompt: give --prompt TEXT or --prompt-file FILE.")
    if asking and not sys.stdin.isatty():
        raise click.UsageError("No prompt: give --prompt TEXT or --prompt-file FILE (asking for one needs a terminal).")
    job = Job(
        wishes,
        out,
        numbered=asking or len(texts) > 1,
        quiet=quiet,
        as_json=as_json,
        save_embeds=save_embeds,
        save_latents=save_latents,
        image=image,
        init_latents=init_latents,
        preview=preview,
    )
    several = prompt_file is not None or len(texts) > 1
    ending = ending_of_program()

    def show(document: dict[str, Any]) -> None:
        if as_json:
            say(json_text(document, None if several else 2))

    def fail(message: str, code: int) -> NoReturn:
        message, code = verdict(message, code)
        tell(f"tmd-run: {message}")
        with failures(lambda *_: sys.exit(code)):  # stdout may be what failed
            show({"error": message})
        raise SystemExit(code)

    if ending is not None:
        ending.last_words = lambda: fail("stopped.", INTERRUPTED)
    with failures(fail):
        check_address_space()
        job.check_targets(len(texts))
        start = perf_counter()
        import tmd_runtime

        with tmd_runtime.load(bundle, engine, threads, device, memory, plans) as pipeline:
            job.opening_seconds = perf_counter() - start
            if asking:
                from .questions import ask

                pipeline.settings(**wishes)  # before the first question, not after it
                ask(job, pipeline, ending)
            if latents is not None:
                show(job.decode(pipeline, latents))
            elif embeds is not None:
                show(job.run_embeds(pipeline, embeds))
            for text in texts or [""] * drawing:
                show(job.run(pipeline, text))


def _check_names(outputs: dict[str, Path | None], inputs: dict[str, Path | None], numbered: bool) -> None:
    """Raises click.UsageError if two results would have one name, or a result that of what it is made from.

    `numbered`: several prompts write video-001.mp4, video-002.mp4, ...
    """
    seen: dict[str, str] = {}
    for option, path in outputs.items() if numbered else ():
        for other, read in inputs.items():
            if path is not None and read is not None and _is_number_of(read, path):
                raise click.UsageError(
                    f"{option} may name {read} for one of the prompts, which {other} reads: give one another name."
                )
    for kind, paths in (("reads", inputs), ("writes", outputs)):
        for option, path in paths.items():
            name = "" if path is None else os.path.realpath(path)
            if name and kind == "writes" and name in seen:
                raise click.UsageError(f"{seen[name]} and {option} name the same file: give one of them another name.")
            if name:
                seen[name] = option


def _is_number_of(path: Path, named: Path) -> bool:
    form = rf"{re.escape(named.stem)}-\d{{3,}}{re.escape(named.suffix)}"
    return os.path.realpath(path.parent) == os.path.realpath(named.parent) and bool(re.fullmatch(form, path.name))


def _check_sources(
    texts: list[str],
    embeds: Path | None,
    latents: Path | None,
    written: dict[str, Path | None],
    wishes: dict[str, Any],
) -> None:
    """A run starts from prompts, a class, embeddings or latents. Raises click.UsageError for a mixture."""
    label = wishes["label"]
    sources = {"--prompt or --prompt-file": texts, "--embeds": embeds, "--latents": latents}
    given = [name for name, value in sources.items() if value] + ["--class"] * (label is not None)
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} are two beginnings of a run: give one of them.")
    if embeds is not None and written["save-embeds"] is not None:
        raise click.UsageError("--embeds has its embeddings in a file already: leave --save-embeds out.")
    if label is not None and written["save-embeds"] is not None:
        raise click.UsageError("a class has no embeddings to save: leave --save-embeds out.")
    if wishes["image"] is not None and wishes["init_latents"] is not None:
        raise click.UsageError("--image and --init-latents are two pictures to start from: give one of them.")
    if wishes["strength"] is not None and wishes["image"] is None and wishes["init_latents"] is None:
        raise click.UsageError("--strength says how much of a picture changes: give --image or --init-latents as well.")
    if latents is not None:
        decided = [
            f"--{name.replace('_', '-')}" for name, value in wishes.items() if value is not None and name != "fps"
        ]
        decided += [f"--{name}" for name, value in written.items() if value]
        if decided:
            raise click.UsageError(f"--latents only decodes, the file has settled the rest: leave {decided[0]} out.")


def main() -> NoReturn:
    """Runs `tmd-run`."""
    # Nothing here multiplies in numpy, and its threads take address space, which a container may count.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Pydantic would read the metadata of every package that is installed, in search of plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    run_program(command, "tmd-run")
