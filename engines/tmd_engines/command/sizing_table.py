"""What `tmd-engine inspect` says of a run's size: as data, and as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..bundle.reader import format_size
from ..cost.sizing import STAGES, StageEstimate, available_bytes, estimate, step_counts
from ..cost.speed import seconds_of
from ..device.cpu import resolve_threads
from ..errors import EngineError
from ..registry import ENGINES, check_engine, choose, engine_class
from .device_memory import device_memory, predicted

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest
    from ..bundle.reader import Bundle


def size_run(
    bundle: Bundle,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    steps: int | None = None,
    inner_steps: int | None = None,
    engine: str = "auto",
) -> dict[str, Any]:
    """`run` (what is made, and its totals) and `stages` by name, all numbers plain; None takes the bundle's default.

    Sizes in pixels, memory in bytes; `flops` of a stage are those of one call. Memory is that of the engine that runs
    the backbone: of a TensorRT on the GPU (`scratch_bytes` is shared by all stages), of the others on a CPU. Raises
    ValueError, BundleError, EngineError for an engine that there is not.
    """
    manifest = bundle.manifest
    video, sampler = manifest.video, manifest.sampler
    width, height = size or (video.width, video.height)
    frames = frames or video.frames
    steps, inner_steps = step_counts(manifest, steps, inner_steps)
    passes = manifest.family.passes(sampler)
    needed = estimate(
        bundle,
        width=width,
        height=height,
        frames=frames,
        steps=steps,
        inner_steps=inner_steps,
        guidance_passes=passes,
        engine=engine,
    )
    chosen = _engine(bundle, engine)
    run = {
        "engine": chosen,
        "width": width,
        "height": height,
        "frames": frames,
        "steps": steps,
        "inner_steps": inner_steps,
        "guidance_passes": passes,
        "nfe": needed.nfe,
        "flops": needed.flops,
        "peak_bytes": {"all": needed.peak("all"), "low": needed.peak("low")},
        "available_bytes": available_bytes(),
        "seconds": seconds_of(needed.flops, bundle, "auto auto", resolve_threads(bundle, None)[0]),
    }
    stages = {name: _stage(manifest, name, stage) for name, stage in needed.stages.items()}
    if _is_tensorrt(chosen):
        memory = device_memory(bundle, (width, height, frames), predicted(bundle, (width, height, frames)))
        run["peak_bytes"] = {"all": sum(memory.every), "low": sum(memory.low)}
        run["available_bytes"] = None  # of the GPU, which may be another machine's
        run["device_lines"] = memory.lines()
        for name, stage in stages.items():
            weights, scratch, buffers = memory.stages[name]
            stage |= {"weight_bytes": weights, "activation_bytes": scratch, "io_bytes": buffers}
    return {"run": run, "stages": stages}


def _engine(bundle: Bundle, engine: str) -> str:
    graph = next(name for name in ("backbone", *bundle.manifest.graphs) if name in bundle.manifest.graphs)
    check_engine(engine)
    try:
        return choose(bundle, graph, engine)[0]
    except EngineError:  # nothing is installed, and the figures can be told all the same
        return "onnxruntime"


def _is_tensorrt(engine: str) -> bool:
    return hasattr(engine_class(engine, next(iter(ENGINES[engine]))), "library")


def _stage(manifest: Manifest, name: str, stage: StageEstimate) -> dict[str, Any]:
    graphs = [manifest.graphs[graph] for graph in STAGES[name] if graph in manifest.graphs]
    return {
        "precision": "/".join(dict.fromkeys(graph.precision for graph in graphs)),
        "parameters": stage.parameters,
        "file_bytes": sum(manifest.files[file].size for graph in graphs for file in (graph.file, graph.data) if file),
        "calls": stage.calls,
        "flops": stage.flops,
        "weight_bytes": stage.weight_bytes,
        "activation_bytes": stage.activation_bytes,
        "io_bytes": stage.io_bytes,
    }


def print_table(data: dict[str, Any]) -> None:
    """Prints what `size_run` found."""
    from rich.console import Console
    from rich.table import Table

    run = data["run"]
    steps = f"{run['steps']} steps" + (f" of {run['inner_steps']} inner steps" if run["inner_steps"] else "")
    passes = ", two passes each (guidance)" if run["guidance_passes"] == 2 else ""
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"a run      {run['frames']} frames of {run['width']}x{run['height']}, {steps}{passes}: "
        f"NFE {run['nfe']:g}, {format_flops(run['flops'])}"
    )
    console.print(f"time       {format_seconds(run['seconds'])} on this machine, without loading")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("  stage", no_wrap=True)
    for title in ("parameters", "calls", "per call", "weights", "running", "buffers"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, stage in data["stages"].items():
        table.add_row(
            f"  {name}",
            f"{stage['parameters'] / 1e6:,.1f} M",
            # A second transformer makes some of the first one's calls, as its boundary says.
            str(stage["calls"]) if stage["calls"] else f"of {name.removesuffix('_2')}",
            format_flops(stage["flops"]),
            *(format_size(stage[part]) for part in ("weight_bytes", "activation_bytes", "io_bytes")),
        )
    console.print(table)
    peaks = run["peak_bytes"]
    if "device_lines" in run:
        console.print(f"GPU memory {run['device_lines'][0]}")
        console.print(f"           {run['device_lines'][1]}, by {run['engine']} (predicted)")
        return
    console.print(
        f"memory     {format_size(peaks['all'])} at the peak with every graph loaded, "
        f"{format_size(peaks['low'])} one stage after the other"
    )
    available = run["available_bytes"]
    if available is not None:
        if peaks["all"] <= available:
            verdict = "enough for both"
        elif peaks["low"] <= available:
            verdict = "enough for the second only: --memory low"
        else:
            verdict = "too little: choose fewer frames or a smaller size"
        console.print(f"           {format_size(available)} are free here: {verdict}")


def format_seconds(seconds: float) -> str:
    """An estimated duration for people, in two digits."""
    for size, unit in ((1.0, "s"), (60.0, "min"), (3600.0, "h")):
        if seconds < 100 * size or unit == "h":
            return f"about {float(f'{seconds / size:.2g}'):g} {unit}"
    raise AssertionError("unreachable")


def format_flops(count: float) -> str:
    """Operations for people: "283.0 TFLOP"."""
    value = count / 1e6
    for unit in ("M", "G", "T"):
        if value < 1000:
            return f"{value:.1f} {unit}FLOP"
        value /= 1000
    return f"{value:.2f} PFLOP"
