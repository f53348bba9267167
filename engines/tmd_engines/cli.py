"""`tmd-engine`: look at a bundle and at this machine. Heavy libraries are imported by the commands, not by `--help`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from .errors import BundleError, EngineError

if TYPE_CHECKING:
    from .bundle import Bundle
    from .manifest import GraphInfo, TensorSpec


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Inspect bundles, and see which engines this machine has."""


def _errors_as_messages(command: Callable[..., None]) -> Callable[..., None]:
    """A failure is one sentence on stderr and exit code 1 (click itself ends bad usage with 2)."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (BundleError, EngineError) as error:
            raise click.ClickException(str(error)) from None

    return wrapped


@main.command()
@click.argument("bundle", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
@_errors_as_messages
def inspect(bundle: str, as_json: bool) -> None:
    """Check the folder BUNDLE completely, and print what is in it."""
    from .bundle import Bundle

    opened = Bundle.open(bundle)
    if as_json:
        document = {"folder": str(opened.folder), **opened.manifest.model_dump(mode="json", exclude_unset=True)}
        click.echo(json.dumps(document, indent=2))
    else:
        for line in _describe(opened):
            click.echo(line)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def doctor(as_json: bool) -> None:
    """Print what this machine has for running graphs, and what to install for the rest."""
    from .doctor import examine

    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
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
    click.echo("engines")
    for name, engine in found["engines"].items():
        state = engine["version"] or f"{engine['problem']}: {engine['install']}"
        later = "" if engine["implemented"] else "  [tmd uses it from a later version on]"
        click.echo(f"  {name:<12} {state}{later}")


def _describe(bundle: Bundle) -> Iterator[str]:
    from .bundle import format_size

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
        f"model      {model.name} ({model.family}, {model.kind}): {model.num_layers} blocks, {model.head_blocks} of "
        f"them flow head ({model.fusion}), width {model.dim}, {model.num_heads} heads of {model.head_dim}"
    )
    yield (
        f"sampler    {sampler.rule}: {sampler.steps} steps (of {_listed(sampler.allowed_steps)}), "
        f"{sampler.inner_steps} inner steps (of {_listed(sampler.allowed_inner_steps)}), "
        f"shift {sampler.shift:g}, inner shift {sampler.inner_shift:g}, t_max {sampler.t_max:g}"
    )
    yield f"video      {video.frames} frames of {video.width}x{video.height} pixels at {video.fps} frames per second"
    yield f"text       {text.tokenizer or 'no tokenizer'}, {text.max_length} tokens of width {text.dim}"
    yield "graphs"
    for name, graph in manifest.graphs.items():
        size = sum(manifest.files[file].size for file in (graph.file, graph.data) if file)
        yield f"  {name}: {graph.precision}, opset {graph.opset}, {format_size(size)}, {_accuracy(graph)}"
        yield f"    in   {_tensors(graph.inputs)}"
        yield f"    out  {_tensors(graph.outputs)}"
    yield f"made from  {origin.source}"
    for file, digest in origin.source_sha256.items():
        yield f"           {file} sha256 {digest}"
    yield f"made by    {origin.tool}, {origin.created}"
    if origin.versions:
        yield f"           {', '.join(f'{library} {version}' for library, version in origin.versions.items())}"


def _listed(values: tuple[int, ...]) -> str:
    return "/".join(map(str, values))


def _accuracy(graph: GraphInfo) -> str:
    if graph.accuracy is None:
        return "accuracy not measured"
    measured = graph.accuracy
    return f"max error {measured.max_abs_error:.1e} and cosine {measured.cosine:.6f} against {measured.reference}"


def _tensors(specs: tuple[TensorSpec, ...], shown: int = 8) -> str:
    parts = [f"{spec.name} {spec.dtype}[{','.join(map(str, spec.shape))}]" for spec in specs[:shown]]
    return ", ".join(parts) + (f", and {len(specs) - shown} more" if len(specs) > shown else "")
