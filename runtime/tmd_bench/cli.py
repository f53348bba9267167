"""`tmd-bench`: the command, its table and its JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tmd_engines import unfinished
from tmd_engines.command.help import SETTINGS, Grouped
from tmd_engines.command.options import BundleFolder, Size, offered_list
from tmd_engines.command.program import run_program, sweep, verdict
from tmd_engines.command.screen import tell
from tmd_engines.registry import engine_names
from tmd_engines.utf8 import json_text
from tmd_runtime.command.failures import failures
from tmd_runtime.command.options import Whole
from tmd_runtime.files.target import Target, write_text

from .families import REFERENCE
from .spec import RIVALS, STAGE_OF, Work

if TYPE_CHECKING:
    from .contest import Entry

# As in tmd_export, which is not imported for --help; a test compares the two.
MODELS = ("tiny", "wan1.3b", "wan14b", "wan2.2-ti2v-5b")
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8", "nvfp4")
PARTS = "backbone,flow_head"


def _rivals(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in (value or "").split(",") if name.strip()))
    for name in names:
        if name not in RIVALS:
            raise click.BadParameter(f"{name!r} is no rival: choose some of {','.join(RIVALS)}.")
    return names


def _precisions(_: click.Context, __: click.Parameter, value: str) -> str:
    """The list of tmd-export. Its names of parts are left to the export, which knows what the model has."""
    for item in filter(None, (item.strip() for item in value.split(","))):
        name = item.rpartition("=")[2].strip()
        if name not in PRECISIONS:
            raise click.BadParameter(f"there is no precision {name!r}: choose among {', '.join(PRECISIONS)}.")
    return value


_GROUPS = {
    "What is measured": ("bundle", "size", "frames", "steps", "inner_steps"),
    "A bundle to export first": (
        *("model", "checkpoint", "random_weights", "blocks", "kind", "parts"),
        *("precision", "text_encoder_weights", "keep"),
    ),
    "How it is measured": ("engine", "threads", "rounds", "apart", "compare"),
    "Reports": ("json_file",),
}


@click.command(
    "tmd-bench",
    cls=Grouped,
    groups=_GROUPS,
    context_settings=SETTINGS,
    epilog="""\
\b
Output:
Every contender has its own process; they are loaded one after the other, run
once (cold), and then in turn (--rounds). Only the stages that the bundle has
graphs for are run, by every contender. diffusers and stable-diffusion.cpp have
no flow head: their figure for the loop is the time of full passes, scaled to
the same number of evaluations. Rivals compute all stages in the precision of the
loop: beside int8, fp8 or nvfp4 those in torch in bf16, and stable-diffusion.cpp in
q8_0; it computes bf16 in f16.
cpu is what the loop (or a stage that is measured alone) took of the processor,
on all threads together: on a shared machine fairer than the time by the clock.
The limit is one large float32 matrix product of numpy with as many threads.

\b
--json FILE: machine, versions, work, limit_flops and per contender load_seconds,
cold_seconds, seconds (median and p90 by stage), flops (by stage), peak_bytes,
peak_anonymous_bytes (without mapped files) and every round; ratio.NAME is, by
stage, NAME's median time over ours.

\b
Exit codes: 0 done, 1 the measurement failed, 2 bad usage, 130 stopped by Ctrl-C
(129 by SIGHUP, 143 by SIGTERM).

\b
Examples:
  tmd-bench                                     # the built-in model, stage by stage
  tmd-bench --bundle my-bundle --compare openvino
  tmd-bench --model wan1.3b --random-weights 0 --size 256x256 --compare torch,diffusers
  tmd-bench --model wan1.3b --random-weights 0 --parts text_encoder --compare diffusers
  tmd-bench --model wan1.3b --random-weights 0 --blocks 6 --precision int8 --compare torch-compile
  tmd-bench --model wan1.3b --checkpoint Wan2.1-T2V-1.3B --kind wan --steps 4 --json bench.json""",
)
@click.version_option(package_name="tmd-runtime", message="tmd-bench %(version)s", help="Print the version.")
@click.option(
    "--bundle",
    type=BundleFolder(path_type=Path),
    metavar="DIR",
    help="Measure this bundle; rivals get the weights of --model.",
)
@click.option(
    "--model", type=click.Choice(MODELS), help="Export a bundle of this model first, and give rivals its weights."
)
@click.option("--checkpoint", multiple=True, metavar="PATH", help="Weights of --model, as in tmd-export.")
@click.option("--random-weights", type=Whole(0), metavar="SEED", help="Random weights for --model.")
@click.option("--blocks", type=Whole(2), metavar="B",
              help="With --random-weights: a model of so many blocks, the share of its flow head kept.")  # fmt: skip
@click.option("--kind", type=click.Choice(tuple(REFERENCE)), default="tmd", show_default=True,
              help="With --random-weights: a TMD student, or Wan itself.")  # fmt: skip
@click.option(
    "--parts",
    shell_complete=offered_list(*PARTS.split(",")),
    default=PARTS,
    show_default=True,
    metavar="LIST",
    help="Graphs that --model exports.",
)
@click.option("--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the bundle that --model makes.")
@click.option("--size", type=Size(), metavar="WxH", help="Pixels.  [default: the bundle's]")
@click.option("--frames", type=Whole(1), metavar="F", help="Frames.  [default: the bundle's]")
@click.option("--steps", type=Whole(1), metavar="M", help="Outer steps.  [default: the bundle's]")
@click.option("--inner-steps", type=Whole(1), metavar="N", help="Flow-head passes per step.  [default: the bundle's]")
@click.option("--engine", type=click.Choice(engine_names()), default="auto", show_default=True, help="Ours.")
@click.option(
    "--precision",
    callback=_precisions,
    shell_complete=offered_list(*PRECISIONS),
    default="fp32",
    show_default=True,
    metavar="P|PART=P,...",
    help="Of --model, as in tmd-export.",
)
@click.option("--text-encoder-weights", type=click.Choice(("int8",)), help="Of --model, as in tmd-export.")
@click.option("--threads", type=Whole(1, 1024), default=1, show_default=True, metavar="T", help="CPU threads.")
@click.option("--rounds", type=Whole(1, 1000), default=5, show_default=True, metavar="R", help="Warm runs of each.")
@click.option("--apart", is_flag=True, help="One contender after the other, for models that memory holds once.")
@click.option(
    "--compare",
    callback=_rivals,
    shell_complete=offered_list(*RIVALS),
    metavar="LIST",
    help=f"Rivals: some of {','.join(RIVALS)}.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Also write everything.")
def command(
    bundle: Path | None,
    model: str | None,
    checkpoint: tuple[str, ...],
    random_weights: int | None,
    blocks: int | None,
    kind: str,
    parts: str,
    keep: Path | None,
    precision: str,
    text_encoder_weights: str | None,
    json_file: Path | None,
    **options: Any,
) -> None:
    """Measure a bundle stage by stage, beside what a user would run instead."""
    if bundle is not None and keep is not None:
        raise click.UsageError("--bundle is there already: leave --keep out, or let --model make the bundle.")
    origin = {"model": model, "checkpoint": checkpoint, "random_seed": random_weights, "kind": kind, "blocks": blocks}
    graphs = {"parts": parts, "precision": precision, "text_encoder_weights": text_encoder_weights}
    if blocks is not None and (model is None or random_weights is None):
        raise click.UsageError("--blocks shortens a model with random weights: give --model and --random-weights too.")
    with failures(_fail):
        if json_file is not None:
            Target(json_file, is_folder=False).discard()  # now, not after the measurement
        _bench(bundle, model, graphs, keep, json_file, origin, options)


def _bench(
    bundle: Path | None,
    model: str | None,
    graphs: dict[str, Any],
    keep: Path | None,
    json_file: Path | None,
    origin: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Finds or makes the bundle, and measures it."""
    from tmd_runtime.built_in import locate

    if model is None:
        needless = {"--checkpoint": origin["checkpoint"], "--random-weights": origin["random_seed"] is not None,
                    "--keep": keep}  # fmt: skip
        if given := [name for name, value in needless.items() if value]:
            raise click.UsageError(f"{given[0]} says where the weights of --model come from: name the model.")
        torch = [name for name in options["compare"] if name not in engine_names()]
        if not torch:
            return _measure(locate(bundle), origin, json_file, options)
        if bundle is not None:
            raise click.UsageError(f"{torch[0]} needs the model's weights, not graphs: give --model, not --bundle.")
        origin |= {"model": "tiny", "kind": "tmd"}
    place = Path(gettempdir())
    sweep("tmd-bench", [place, *([keep.absolute().parent] if keep else [])])
    folder = unfinished.begin(place, is_folder=True)
    try:
        out = locate(bundle) if bundle else keep or folder / "bundle"
        if bundle is None:
            _export(origin, graphs, out)
        _measure(out, origin, json_file, options, folder)
    finally:
        unfinished.discard(folder)


def _export(origin: Mapping[str, Any], graphs: Mapping[str, Any], out: Path) -> None:
    """The bundle to measure. Raises click.ClickException."""
    if origin["random_seed"] is not None:
        plan = {**origin, **graphs, "out": str(out)}
        work = ["tmd_bench.random_model", json.dumps(plan)]
    else:
        arguments = ["--model", origin["model"], "--out", str(out)]
        arguments += [
            word for name, value in graphs.items() if value for word in (f"--{name.replace('_', '-')}", value)
        ]
        arguments += [word for path in origin["checkpoint"] for word in ("--checkpoint", path)]
        work = ["tmd_export.cli", *arguments, "--no-verify"]
    click.echo("exporting", err=True)
    _in_child(work, "the bundle could not be exported")


def _in_child(work: list[str], problem: str) -> None:
    """A module of ours in a process of its own, whose memory goes with it. Raises click.ClickException."""
    import subprocess

    command = [sys.executable, "-m", "tmd_bench.child", *work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2) as process:  # it ends at the end of its stdin
        code = process.wait()
    if code:
        raise click.ClickException(f"{problem}; the lines above say why.")


def _measure(
    bundle: Path,
    origin: Mapping[str, Any],
    json_file: Path | None,
    options: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """`folder` is for the weights of rivals that read no bundle; it is there when `origin` names a model."""
    from tmd_engines import Bundle
    from tmd_engines.cost.sizing import estimate
    from tmd_engines.device.cpu import describe_cpu
    from tmd_runtime.sampling import resolve_settings

    from .contest import contest
    from .limit import FLOPS

    opened = Bundle.open(bundle)
    settings = resolve_settings(
        opened.manifest, 0, options["steps"], options["inner_steps"], options["frames"], options["size"], guidance=1.0
    )
    graphs = opened.manifest.graphs
    stages = {stage: graph for graph, stage in STAGE_OF.items() if graph in graphs}
    if "denoise" not in stages and len(stages) != 1:
        raise click.UsageError("without backbone and flow head, one stage can be measured: name its --parts alone.")
    work = Work(
        str(bundle), "", settings.width, settings.height, settings.frames, settings.steps, settings.inner_steps,
        options["threads"], stages=tuple(stages), **origin,
    )  # fmt: skip
    precision = graphs[stages[work.main_stage]].precision
    rivals = [name for name in options["compare"] if name != options["engine"]]
    published = None
    if "stable-diffusion.cpp" in rivals:
        assert folder is not None  # its weights are a model's, which was exported first
        published = str(folder / "published")
    work = replace(work, precision=precision, published=published)
    if published is not None:
        _in_child(["tmd_bench.published", work.to_json(), published], "the weights could not be written for a rival")
    inner_steps = None if opened.manifest.family.inner_steps(opened.manifest.sampler) is None else work.inner_steps
    needed = estimate(opened, width=work.width, height=work.height, frames=work.frames, steps=work.steps,
                      inner_steps=inner_steps)  # fmt: skip
    flops = {name: stage.flops * stage.calls for name, stage in needed.stages.items()}
    flops = {"text" if name == "text_encoder" else "decode" if name == "decoder" else name: count
             for name, count in flops.items()}  # fmt: skip
    flops["denoise"] = flops.get("backbone", 0) + flops.get("flow_head", 0)
    flops = {"cpu": flops[work.main_stage], **{name: count for name, count in flops.items() if count}}
    engine = options["engine"]
    entries = contest([engine, *rivals, "limit"], work, options["rounds"], _progress(), apart=options["apart"])
    limit = FLOPS / entries.pop("limit").median("matmul")
    ours = entries[engine]
    ratio = {
        name: {stage: entries[name].median(stage) / ours.median(stage)
               for stage in (*work.stages, "cpu") if all(stage in one.rounds[0] for one in (ours, entries[name]))}
        for name in rivals
    }  # fmt: skip
    document = {
        "machine": {**describe_cpu(), "system": platform.platform(), "python": platform.python_version()},
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
        "work": json.loads(work.to_json()),
        "nfe": settings.nfe,
        "limit_flops": limit,
        "contenders": {name: {**entry.summary(), "flops": flops} for name, entry in entries.items()},
        "ratio": ratio,
    }
    if json_file is not None:
        write_text(json_file, json_text(document, 1) + "\n")
    _show(work, entries, flops, limit, ratio)


_LIBRARIES = (
    *("tmd-runtime", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch", "diffusers"),
    *("transformers", "stable-diffusion-cpp-python"),
)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _progress() -> Callable[[str], None]:
    if not sys.stderr.isatty():
        return lambda line: None
    return lambda line: click.echo(f"\r\x1b[2K{line}", nl=False, err=True)


def _show(
    work: Work,
    entries: Mapping[str, Entry],
    flops: Mapping[str, int],
    limit: float,
    ratio: Mapping[str, Mapping[str, float]],
) -> None:
    from rich.console import Console
    from rich.table import Table

    if sys.stderr.isatty():
        click.echo("\r\x1b[2K", nl=False, err=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("stage", "median", "p90", "cold", "GFLOP/s", "of limit"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for name, entry in entries.items():
        for number, (stage, warm) in enumerate(entry.summary()["seconds"].items()):
            rate = flops[stage] / warm["median"] if stage in flops and warm["median"] else None
            table.add_row(
                name if number == 0 else "", stage, *(f"{1000 * warm[key]:.1f} ms" for key in ("median", "p90")),
                f"{1000 * entry.cold.get(stage, 0.0):.1f} ms",
                *(("", "") if rate is None else (f"{rate / 1e9:.0f}", f"{100 * rate / limit:.0f} %")),
            )  # fmt: skip
    console = Console(width=100)
    click.echo(
        f"{work.frames} frames of {work.width}x{work.height}, {work.steps} x {work.inner_steps} steps, "
        f"{work.precision}, {work.threads} thread{'s' * (work.threads > 1)}; "
        f"limit {limit / 1e9:.0f} GFLOP/s (float32 matrix product)"
    )
    console.print(table)
    for name, entry in entries.items():
        loading = sum(entry.load.values())
        times = [f"{stage} {found:.2f} x" for stage, found in ratio.get(name, {}).items()]
        beside = f"; of our time: {', '.join(times)}" if times else ""
        click.echo(
            f"{name}: {loading:.2f} s to load, peak {entry.peak_bytes / 1e6:.0f} MB "
            f"({entry.peak_anonymous_bytes / 1e6:.0f} MB without mapped files){beside}"
        )


def _fail(message: str, code: int) -> NoReturn:
    message, code = verdict(message, code)
    tell(f"tmd-bench: {message}")
    sys.exit(code)


def main() -> NoReturn:
    """Runs `tmd-bench`."""
    run_program(command, "tmd-bench")
