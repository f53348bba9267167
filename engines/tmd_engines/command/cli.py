"""`tmd-engine`: look at a bundle and at this machine. Heavy libraries are imported by the commands, not by `--help`."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from ..errors import BundleError, EngineError
from ..registry import engine_names
from ..utf8 import json_text
from .help import SETTINGS, Grouped
from .options import BundleFolder, Size, offered
from .screen import of_file

if TYPE_CHECKING:
    from ..bundle.manifest import GraphInfo, TensorSpec
    from ..bundle.reader import Bundle

_NAMES = f"{', '.join(engine_names()[:-1])} or {engine_names()[-1]}"
_ENGINES = f"What computes: {_NAMES}."
_OFFERED = offered(*engine_names())
_EXIT_CODES = """\
\b
Exit codes: 0 done, 1 failed, 2 bad usage, 130 stopped by Ctrl-C (129 by SIGHUP,
143 by SIGTERM).

\b
Examples:
"""


@click.group(
    context_settings=SETTINGS,
    epilog=f"""{_EXIT_CODES}\
  tmd-engine doctor
  tmd-engine inspect builtin:tiny
  tmd-engine verify my-bundle --engine openvino
  tmd-engine build --help                      # what one of the commands takes""",
)
@click.version_option(package_name="tmd-runtime", message="tmd-engine %(version)s", help="Print the version.")
def main() -> None:
    """Inspect and build bundles, and see which engines this machine has."""


def _errors_as_messages(command: Callable[..., None]) -> Callable[..., None]:
    """A failure is one sentence on stderr and exit code 1 (click itself ends bad usage with 2)."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (BundleError, EngineError) as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.filename is not None:
                raise click.ClickException(of_file(error)) from None
            # Standard output is full or closed.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python fails once more at its end
            raise click.ClickException(f"standard output cannot be written: {error.strerror}.") from None

    return wrapped


@main.command(
    context_settings=SETTINGS,
    short_help="What is in a bundle, and what a run of it needs.",
    epilog=f"""{_EXIT_CODES}\
  tmd-engine inspect builtin:tiny
  tmd-engine inspect my-bundle --size 832x480 --frames 81 --steps 4
  tmd-engine inspect my-bundle --json | jq .run""",
)
@click.argument("bundle", type=BundleFolder())
@click.option("--size", type=Size(), metavar="WxH", help="Size of the video to calculate with, in pixels.")
@click.option("--frames", type=click.IntRange(1, 100_000), metavar="F", help="Its number of frames.")
@click.option("--steps", type=click.IntRange(1, 1000), metavar="M", help="Outer steps to calculate with.")
@click.option("--inner-steps", type=click.IntRange(1, 1000), metavar="N", help="Inner steps per outer step.")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="E",
    shell_complete=_OFFERED,
    help=f"Whose memory to tell: {_NAMES}.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@_errors_as_messages
def inspect(
    bundle: str,
    size: tuple[int, int] | None,
    frames: int | None,
    steps: int | None,
    inner_steps: int | None,
    engine: str,
    as_json: bool,
) -> None:
    """Check the folder BUNDLE (or builtin:NAME) completely, and print what is in it and what a run needs.

    Operations and memory are those of one run, at the size and with the steps that the bundle names or you do.
    """
    from .built_in import open_bundle
    from .sizing_table import print_table, size_run

    opened = open_bundle(bundle)
    problem = None
    try:
        sized = size_run(opened, size, frames, steps, inner_steps, engine)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except BundleError as error:  # the bundle itself is whole, and the rest can be told
        sized, problem = None, str(error)
    if as_json:
        document = {"folder": str(opened.folder), **opened.manifest.model_dump(mode="json", exclude_unset=True)}
        document |= sized or {"run": None, "stages": None, "sizing_problem": problem}
        click.echo(json_text(document))
        return
    for line in _describe(opened):
        click.echo(line)
    if sized:
        print_table(sized)
    else:
        click.echo(f"a run      {problem}")


@main.command(
    context_settings=SETTINGS,
    short_help="Compare every graph on an engine with ONNX Runtime.",
    epilog=f"""{_EXIT_CODES}\
  tmd-engine verify builtin:tiny
  tmd-engine verify my-bundle --engine openvino --threads 8""",
)
@click.argument("bundle", type=BundleFolder())
@click.option("--engine", default="auto", show_default=True, metavar="E", shell_complete=_OFFERED, help=_ENGINES)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="T", help="CPU threads.  [default: all cores]")
@click.option("--seed", type=click.IntRange(0), metavar="N", default=0, show_default=True, help="Of the inputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@_errors_as_messages
def verify(bundle: str, engine: str, threads: int | None, seed: int, as_json: bool) -> None:
    """Compare every graph of BUNDLE on an engine with ONNX Runtime in float32; exit with 1 when one is off."""
    from dataclasses import asdict

    from .built_in import open_bundle
    from .verify import verify as checks

    done = []
    for check in checks(open_bundle(bundle), engine, threads, seed):
        done.append(check)
        if not as_json:
            numbers = [
                "" if check.max_abs_error is None else f"max error {check.max_abs_error:.1e}",
                "" if check.cosine is None else f"cosine {check.cosine:.6f}",
                "" if check.max_levels is None else f"levels {check.max_levels}",
            ]
            measured = "".join(f"{number:<20}" for number in numbers)
            state = "ok" if check.problem is None else f"FAILED: {check.problem}"
            click.echo(f"{check.graph:<14} {check.precision:<5} {check.engine:<12} {measured} {state}")
    failed = [check.graph for check in done if check.problem is not None]
    if as_json:
        graphs = [{name: _plain(value) for name, value in asdict(check).items()} for check in done]
        click.echo(json_text({"passed": not failed, "graphs": graphs}))
    elif all(check.engine == "onnxruntime" for check in done):
        click.echo("ONNX Runtime was compared with itself: only NaN and Inf would have been found.")
    if failed:
        raise click.ClickException(
            f"{len(failed)} of {len(done)} graphs failed ({', '.join(failed)}): do not use this bundle on this engine."
        )


class _Sizes(Size):
    """One size, or two with .. between them."""

    name = "WxH..WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = value.split("..") if isinstance(value, str) else value
        if len(parts) > 2:
            self.fail(f"{value!r} is no range of sizes: write it as 256x256..1280x720.", param, ctx)
        first, last = (super(_Sizes, self).convert(part, param, ctx) for part in (parts[0], parts[-1]))
        return first, last


class _Counts(click.ParamType):
    """A number, or two with .. between them."""

    name = "N..N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"([1-9][0-9]{0,4})(?:\.\.([1-9][0-9]{0,4}))?", value) if isinstance(value, str) else None
        if not match:
            self.fail(f"{value!r} is no number of frames: write 81, or 17..81 for a range.", param, ctx)
        return int(match[1]), int(match[2] or match[1])


@main.command(
    cls=Grouped,
    groups={
        "Which videos to compile for": ("size", "frames"),
        "What compiles": ("engine", "device", "threads"),
        "For other machines": ("out", "targets", "trtexec", "tensorrt_version"),
    },
    context_settings=SETTINGS,
    short_help="Compile every graph ahead, for one size of video or a range.",
    epilog=f"""{_EXIT_CODES}\
  tmd-engine build my-bundle --size 832x480 --frames 81
  tmd-engine build my-bundle --engine tensorrt-rtx --out plans --for 8.9,12.0
  tmd-engine build my-bundle --size 256x256..1280x720 --frames 17..81
  tmd-engine build my-bundle --trtexec graphs --tensorrt-version 10.13""",
)
@click.argument("bundle", type=BundleFolder())
@click.option("--engine", default="auto", show_default=True, metavar="E", shell_complete=_OFFERED, help=_ENGINES)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="D",
    shell_complete=offered("auto", "cpu", "cuda"),
    help="Where: auto, cpu, cuda or cuda:N.",
)
@click.option(
    "--size",
    type=_Sizes(),
    metavar="WxH[..WxH]",
    help="Size of the videos to come, in pixels, or a range of them for one plan.  [default: the bundle's]",
)
@click.option("--frames", type=_Counts(), metavar="N[..N]", help="Their number of frames.  [default: the bundle's]")
@click.option(
    "--out",
    type=click.Path(),
    metavar="DIR",
    help="Build plans of tensorrt-rtx into a new folder, for other machines. Needs no GPU.",
)
@click.option(
    "--for",
    "targets",
    metavar="GPUS",
    help="With --out: rtx for every RTX card from compute capability 8.0 on, or some, as 8.9,12.0.  [default: rtx]",
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="T", help="CPU threads.  [default: all cores]")
@click.option(
    "--trtexec",
    type=click.Path(),
    metavar="DIR",
    help="Build nothing: write the graphs as TensorRT gets them into DIR, and print NVIDIA's command lines for each: "
    "trtexec, and polygraphy to compare with ONNX Runtime.",
)
@click.option(
    "--tensorrt-version", metavar="M.N", help="With --trtexec: for this version.  [default: the one installed]"
)
@_errors_as_messages
def build(
    bundle: str,
    engine: str,
    device: str,
    size: tuple[tuple[int, int], tuple[int, int]] | None,
    frames: tuple[int, int] | None,
    out: str | None,
    targets: str | None,
    threads: int | None,
    trtexec: str | None,
    tensorrt_version: str | None,
) -> None:
    """Compile every graph of BUNDLE for one size of video, or a range, and keep what can be kept for the runs to come.

    Steps do not matter: a plan serves any number of them. TMD_TENSORRT_WORKSPACE (MiB) limits TensorRT's memory, then
    and in the runs; TMD_CACHE names the folder of the cache.
    """
    from . import build as builder
    from .build_table import print_build, print_plans, tensorrt_version_of
    from .built_in import open_bundle
    from .sizes import sizes_between

    if targets is not None and out is None:
        raise click.UsageError("--for goes with --out, the folder of the plans.")
    if out is not None and trtexec is not None:
        raise click.UsageError("--out builds plans, --trtexec writes what others build them from: give one of them.")
    opened = open_bundle(bundle)
    video = opened.manifest.video
    low, high = size or ((video.width, video.height),) * 2
    first, last = frames or (video.frames,) * 2
    try:
        wanted = sizes_between(opened, ((*low, first), (*high, last)))
        if out is not None:
            print_plans(opened, engine, wanted, targets or "rtx", out)
            return
        if trtexec is None:
            print_build(opened, engine, device, wanted, threads)
            return
        from pathlib import Path

        for _, *commands in builder.write_for_trtexec(
            opened, Path(trtexec), tensorrt_version_of(tensorrt_version), wanted.largest
        ):
            click.echo("\n".join(commands))
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@main.command(
    context_settings=SETTINGS,
    short_help="What this machine can run, and what to install for the rest.",
    epilog=f"""{_EXIT_CODES}\
  tmd-engine doctor
  tmd-engine doctor --json | jq .engines""",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def doctor(as_json: bool) -> None:
    """Print what this machine has for running graphs, and what to install for the rest."""
    from ..tensorrt.targets import lacking
    from .doctor import examine

    found = examine()
    if as_json:
        click.echo(json_text(found))
        return
    cpu, nvidia = found["cpu"], found["nvidia"]
    features = "unknown" if cpu["features"] is None else " ".join(cpu["features"]) or "none of interest"
    click.echo(f"python     {found['python']}")
    click.echo(f"platform   {found['platform']}")
    click.echo(f"cpu        {cpu['name']}, {cpu['cores']} cores")
    click.echo(f"features   {features}")
    if nvidia is None:
        click.echo("nvidia     no driver seen")
    else:
        gpus = "; ".join(f"{gpu['name']} (compute capability {gpu['compute_capability']})" for gpu in nvidia["gpus"])
        click.echo(f"nvidia     driver {nvidia['driver']}: {gpus or 'GPUs not listed, nvidia-smi is missing'}")
        for gpu in nvidia["gpus"]:
            lacks = lacking(gpu["compute_capability"])
            if lacks:
                click.echo(f"           {gpu['name']} {lacks}")
    click.echo("engines")
    for name, engine in found["engines"].items():
        state = engine["version"] or f"{engine['problem']}: {engine['install']}"
        state += f", {engine['note']}" if engine["note"] else ""
        click.echo(f"  {name:<12} {state}")


def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and Inf are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _describe(bundle: Bundle) -> Iterator[str]:
    from ..bundle.reader import format_size
    from ..tensorrt.targets import needed

    manifest = bundle.manifest
    model, sampler, video, text, origin = (
        manifest.model,
        manifest.sampler,
        manifest.video,
        manifest.text,
        manifest.provenance,
    )
    total = sum(file.size for file in manifest.files.values())
    yield f"bundle     {bundle.folder}"
    yield f"           {len(manifest.files)} files, {format_size(total)}, sizes and sha256 are right"
    yield (
        f"model      {model.name} ({model.architecture}, {model.family}): "
        f"{manifest.family.describe_model(model)}, width {model.dim}, {model.num_heads} heads of {model.head_dim}"
    )
    yield f"sampler    {manifest.family.describe(sampler)}"
    made = "one picture" if video.frames == 1 else f"{video.frames} frames at {video.fps} frames per second"
    yield f"video      {made}, {video.width}x{video.height} pixels"
    yield f"text       {text.tokenizer or 'no tokenizer'}, {text.max_length} tokens of width {text.dim}"
    yield "graphs"
    for name, graph in manifest.graphs.items():
        size = sum(manifest.files[file].size for file in (graph.file, graph.data) if file)
        yield f"  {name}: {graph.precision}, opset {graph.opset}, {format_size(size)}, {_accuracy(graph)}"
        if asks := needed(graph.precision):
            yield f"    for  {asks}"
        yield f"    in   {_tensors(graph.inputs)}"
        yield f"    out  {_tensors(graph.outputs)}"
    yield f"made from  {origin.source}"
    for file, digest in origin.source_sha256.items():
        yield f"           {file} sha256 {digest}"
    for lora in origin.loras:
        yield f"           LoRA {lora.file} at strength {lora.strength:g}, sha256 {lora.sha256}"
    yield f"made by    {origin.tool}, {origin.created}"
    if origin.versions:
        yield f"           {', '.join(f'{library} {version}' for library, version in origin.versions.items())}"


def _accuracy(graph: GraphInfo) -> str:
    if graph.accuracy is None:
        return "accuracy not measured"
    measured = graph.accuracy
    return f"max error {measured.max_abs_error:.1e} and cosine {measured.cosine:.6f} against {measured.reference}"


def _tensors(specs: tuple[TensorSpec, ...], shown: int = 8) -> str:
    parts = [f"{spec.name} {spec.dtype}[{','.join(map(str, spec.shape))}]" for spec in specs[:shown]]
    return ", ".join(parts) + (f", and {len(specs) - shown} more" if len(specs) > shown else "")
