"""`tmd-run`: a prompt on the command line, a video in a file.

Only click is imported at the top, so that `--help` answers at once; the rest comes in when there is something to run.
"""

from __future__ import annotations

import json
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .errors import RuntimeFailure, UsageFailure

if TYPE_CHECKING:
    from .pipeline import Pipeline, Result

FAILED, BAD_USAGE, INTERRUPTED = 1, 2, 130
# As in tmd_engines, which is not imported for --help; a test compares the two.
ENGINES = ("auto", "onnxruntime", "openvino", "tensorrt")
_SLUG_LENGTH = 48


class Size(click.ParamType):
    """WIDTHxHEIGHT in pixels."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"\s*([0-9]{1,6})\s*[xX×]\s*([0-9]{1,6})\s*", value)
        if not match:
            self.fail(f"{value!r} is no size: write width x height in pixels, such as 64x64.", param, ctx)
        return int(match[1]), int(match[2])


class Whole(click.ParamType):
    """A whole number in a range; says so in words where click would print an inequality."""

    name = "number"

    def __init__(self, low: int, high: int | None = None) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        # Length first: Python refuses to read numbers of thousands of digits, with an error of its own.
        if not isinstance(value, int) and not re.fullmatch(r"\s*[+-]?[0-9]{1,40}\s*", value):
            self.fail(f"{value[:40]!r} is no whole number.", param, ctx)
        number = int(value)
        if number < self.low or (self.high is not None and number > self.high):
            allowed = f"{self.low} or more" if self.high is None else f"from {self.low} to {self.high}"
            self.fail(f"{number} is out of range: give a whole number, {allowed}.", param, ctx)
        return number


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"tmd-run {version('tmd')}")
    except PackageNotFoundError:
        click.echo("tmd-run (not installed, run from its sources)")
    ctx.exit()


@click.command(
    "tmd-run",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\
\b
Examples:
  tmd-run --prompt "a red circle moving right on a black background"
  tmd-run --prompt "a blue star spinning" --seed 7 --steps 2 --out star.gif
  tmd-run --prompt-file prompts.txt --bundle my-bundle --json > runs.json
  tmd-run                              a prompt loop that keeps the model loaded

\b
--json prints one document with the keys seed, prompt, steps, inner_steps, nfe,
frames, width, height, fps, stage_seconds, total_seconds, out, warnings.
With --prompt-file or several --prompt it is {"runs": [...]}. After a failure it
has "error" (and the runs that were finished). In stage_seconds, load is what
only the first run pays, and file (encoding) goes on beside decode.

\b
Exit codes: 0 done, 1 the run failed, 2 bad usage, 130 stopped by Ctrl-C.
A file appears under its name only when it is complete.""",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to show. May be given several times.")
@click.option("--prompt-file", type=click.File("rb"), metavar="FILE", help="One prompt per line, UTF-8; - reads stdin.")
@click.option(
    "--bundle", type=click.Path(path_type=Path), metavar="DIR", help="Exported model.  [default: the built-in one]"
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ends in .mp4, .webm, .gif or .png (contact sheet); without an ending: a folder of PNG frames. "
    "Several prompts get NAME-001, NAME-002, ...  [default: PROMPT-SEED.mp4 in this folder]",
)
@click.option(
    "--seed", type=Whole(0, 2**64 - 1), metavar="N", help="Same seed, same video.  [default: random, printed]"
)
@click.option("--steps", type=Whole(1), metavar="M", help="Outer steps, one backbone pass each.")
@click.option("--inner-steps", type=Whole(1), metavar="N", help="Flow-head passes per outer step.")
@click.option("--frames", type=Whole(1), metavar="F", help="Length in frames: 1 plus a multiple of 4.")
@click.option("--size", type=Size(), metavar="WxH", help="Width and height in pixels, multiples of 16.")
@click.option(
    "--engine", type=click.Choice(ENGINES), default="auto", show_default=True, help="What computes the graphs."
)
@click.option("--threads", type=Whole(1, 1024), metavar="T", help="CPU threads.  [default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, everything else on stderr.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors (and JSON with --json).")
@click.option(
    "--version", is_flag=True, callback=_print_version, expose_value=False, is_eager=True, help="Print the version."
)
def command(
    prompts: tuple[str, ...],
    prompt_file: Any,
    bundle: Path | None,
    out: Path | None,
    seed: int | None,
    steps: int | None,
    inner_steps: int | None,
    frames: int | None,
    size: tuple[int, int] | None,
    engine: str,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn a prompt into a video with an exported few-step model.

    Steps, inner steps, frames and size default to what the model was made for. Without --prompt in a terminal it asks
    for prompts one after the other and keeps the model loaded. Nothing is downloaded or sent anywhere.
    """
    texts = _read_prompts(prompts, prompt_file)
    asking = not texts
    if asking and as_json:
        raise click.UsageError("--json needs a prompt: give --prompt TEXT or --prompt-file FILE.")
    if asking and not sys.stdin.isatty():
        raise click.UsageError("No prompt: give --prompt TEXT or --prompt-file FILE (asking for one needs a terminal).")
    wishes: dict[str, Any] = {"seed": seed, "steps": steps, "inner_steps": inner_steps, "frames": frames, "size": size}
    job = Job(wishes, out, numbered=asking or len(texts) > 1, quiet=quiet, as_json=as_json)
    several = prompt_file is not None or len(texts) > 1
    records: list[dict[str, Any]] = []

    def fail(message: str, code: int) -> NoReturn:
        click.echo(f"tmd-run: {message}", err=True)
        if as_json:
            _print_json({"error": message, "runs": records} if several else {"error": message})
        raise SystemExit(code)

    with _failures(fail):
        job.check_targets(len(texts))
        start = perf_counter()
        import tmd_runtime

        with tmd_runtime.load(bundle, engine=engine, threads=threads) as pipeline:
            pipeline.settings(**wishes)
            job.opening_seconds = perf_counter() - start
            if asking:
                _ask(job, pipeline)
            for text in texts:
                records.append(job.run(pipeline, text))
            if as_json:
                _print_json({"runs": records} if several else records[0])


@contextmanager
def _failures(fail: Callable[[str, int], NoReturn]) -> Iterator[None]:
    """Everything that can go wrong for a reason outside this program ends in `fail(message, exit code)`."""
    try:
        yield
    except UsageFailure as error:
        fail(str(error), BAD_USAGE)
    except RuntimeFailure as error:
        fail(str(error), FAILED)
    except KeyboardInterrupt:
        fail("stopped.", INTERRUPTED)
    except MemoryError:
        fail("there is not enough memory for this model. Close other programs, or use a smaller model.", FAILED)
    except OSError as error:
        fail(f"{error}.", FAILED)
    except Exception as error:
        from tmd_engines import BundleError, EngineError

        if not isinstance(error, (BundleError, EngineError)):
            raise
        fail(str(error), FAILED)


@dataclass
class Job:
    """What all prompts of one call share: the wishes for the pipeline, where results go and what is printed."""

    wishes: dict[str, Any]
    out: Path | None
    numbered: bool
    quiet: bool
    as_json: bool
    opening_seconds: float = 0.0
    done: int = 0

    def check_targets(self, count: int) -> None:
        """Fail now, not after minutes of work, if a result could not be written."""
        from .video import check_target

        for number in range(1, max(count, 1) + 1 if self.out else 2):
            check_target(self.target("video", 0, number))

    def target(self, prompt: str, seed: int, number: int) -> Path:
        """File of the prompt with this number (from 1)."""
        if self.out is None:
            return Path(f"{slug(prompt)}-{seed}.mp4")
        if not self.numbered:
            return self.out
        if not self.out.name:
            raise UsageFailure(
                f"several prompts cannot all go to {self.out}: name a file or folder, such as video.mp4."
            )
        return self.out.with_name(f"{self.out.stem}-{number:03d}{self.out.suffix}")

    def run(self, pipeline: Pipeline, prompt: str) -> dict[str, Any]:
        """Make one video, print about it, and return its record for JSON."""
        from .progress import Bars, in_terminal
        from .video import open_video

        settings = pipeline.settings(**self.wishes)
        target = self.target(prompt, settings.seed, self.done + 1)
        start = perf_counter()
        with (
            Bars(settings, visible=in_terminal() and not self.quiet) as bars,
            open_video(target, settings.fps) as video,
        ):
            result = pipeline(prompt, **{**self.wishes, "seed": settings.seed}, callback=bars, on_frames=video.write)
        # The bundle was opened for the first prompt alone.
        total = perf_counter() - start + self.opening_seconds
        result.stage_seconds["load"] += self.opening_seconds
        result.stage_seconds["file"] = video.seconds
        self.opening_seconds = 0.0
        self.done += 1
        for warning in result.warnings:
            if not self.quiet:
                click.echo(f"tmd-run: note: {warning}", err=True)
        if not self.quiet and not self.as_json:
            click.echo(_report(result, target))
        return _record(result, target, total)


def _report(result: Result, target: Path) -> str:
    from .progress import LABELS

    seconds = {LABELS[stage]: value for stage, value in result.stage_seconds.items() if stage not in ("load", "noise")}
    times = ", ".join(f"{label} {_duration(value)}" for label, value in seconds.items())
    load = result.stage_seconds["load"]
    frames = f"{len(result.frames)} frames" if len(result.frames) > 1 else "1 frame"
    return (
        f"{target}: {frames} of {result.width}x{result.height} at {result.fps} fps\n"
        f"  seed {result.seed}, steps {result.steps} x {result.inner_steps}, NFE {result.nfe:.2f}\n"
        f"  {times}" + (f" (and load {_duration(load)}, once)" if load else "")
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _record(result: Result, target: Path, total: float) -> dict[str, Any]:
    return {
        "seed": result.seed,
        "prompt": result.prompt,
        "steps": result.steps,
        "inner_steps": result.inner_steps,
        "nfe": result.nfe,
        "frames": len(result.frames),
        "width": result.width,
        "height": result.height,
        "fps": result.fps,
        "stage_seconds": {stage: round(value, 6) for stage, value in result.stage_seconds.items()},
        "total_seconds": round(total, 6),
        "out": str(target),
        "warnings": list(result.warnings),
    }


def _print_json(document: dict[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2))


def _read_prompts(prompts: tuple[str, ...], prompt_file: Any) -> list[str]:
    texts = list(prompts)
    if any(not text.strip() for text in texts):
        raise click.BadParameter("the prompt is empty: describe the video in a few words.", param_hint="--prompt")
    if prompt_file is not None:
        try:
            lines = prompt_file.read().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise click.BadParameter(
                f"{prompt_file.name} is not UTF-8 text: save it as UTF-8.", param_hint="--prompt-file"
            ) from error
        except OSError as error:
            raise click.BadParameter(
                f"{prompt_file.name} cannot be read: {error.strerror}.", param_hint="--prompt-file"
            ) from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise click.BadParameter(
                f"{prompt_file.name} holds no prompt: write one per line.", param_hint="--prompt-file"
            )
        texts += found
    return texts


def slug(prompt: str) -> str:
    """A file name from a prompt: its letters and digits, words joined by '-', cut between words."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt).lower())
    name = ""
    for word in words:
        # Counted in bytes: file systems allow 255 of them, and a letter may take four.
        longer = f"{name}-{word}" if name else word.encode()[:_SLUG_LENGTH].decode(errors="ignore")
        if len(longer.encode()) > _SLUG_LENGTH:
            break
        name = longer
    return name or "video"


def _ask(job: Job, pipeline: Pipeline) -> None:
    """The prompt loop. A run that fails or is stopped does not end it."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives input() history and editing where there is one)
    click.echo("Describe a video and press Enter. An empty line ends, Ctrl-C stops a run.", err=True)
    while True:
        try:
            text = input("prompt> ").strip()
        except EOFError:
            click.echo(err=True)
            return
        if not text:
            return

        def show(message: str, _: int) -> None:
            click.echo(f"tmd-run: {message}", err=True)

        with _failures(show):  # type: ignore[arg-type]
            job.run(pipeline, text)


def main() -> NoReturn:
    """Entry point of `tmd-run`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A file name or prompt that the terminal cannot show must not end a run.
            stream.reconfigure(errors="backslashreplace")
    # Ended by a service manager, clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        command.main(prog_name="tmd-run", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)
    finally:
        # What follows is Python's own shutdown: a second Ctrl-C there would print a traceback and change the exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(0)
