"""What a run's end looks like: lines for people, and the record of `--json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .progress import LABELS

if TYPE_CHECKING:
    from pathlib import Path

    from ..result import Result


def report(result: Result, has_inner_steps: bool, target: Path | None, files: dict[str, Path]) -> str:
    """What people read of a run, in two lines and one for each file."""
    shown = {stage: value for stage, value in result.stage_seconds.items() if stage not in ("load", "noise")}
    seconds = {LABELS[stage]: value for stage, value in shown.items()}
    times = ", ".join(f"{label} {duration(value)}" for label, value in seconds.items())
    load = result.stage_seconds["load"]
    frames = f"{len(result.frames)} frames" if len(result.frames) > 1 else "1 frame"
    lines = []
    if target is not None:
        lines.append(f"{target}: {frames} of {result.width}x{result.height} at {result.fps} fps")
    lines += [f"{path}: {kind} of this run" for kind, path in files.items()]
    steps = f"{result.steps} x {result.inner_steps}" if has_inner_steps else f"{result.steps}"
    guidance = f", guidance {result.guidance:g}" if result.guidance != 1 else ""
    rho = f", rho {result.rho:g}" if result.rho else ""
    lines.append(f"  seed {result.seed}, steps {steps}{guidance}{rho}, NFE {result.nfe:.2f}")
    lines.append(f"  {times}" + (f" (and load {duration(load)}, once)" if load else ""))
    return "\n".join(lines)


def about(seconds: float) -> str:
    """A duration that is only estimated: one or two digits of it, in the unit that fits."""
    if seconds < 1:
        return "less than a second"
    for size, unit in ((1.0, "s"), (60.0, "min"), (3600.0, "h")):
        if seconds < 100 * size or unit == "h":
            return f"about {float(f'{seconds / size:.2g}'):g} {unit}"
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """A duration that was measured."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def record(
    result: Result, target: Path | None, total: float, files: dict[str, Path], estimated: float | None
) -> dict[str, Any]:
    """What `--json` says of a run."""
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
        "out": None if target is None else str(target),
        "warnings": list(result.warnings),
        "rule": result.rule,
        "guidance": result.guidance,
        "memory": result.memory,
        "embeds": str(files["embeds"]) if "embeds" in files else None,
        "latents": str(files["latents"]) if "latents" in files else None,
        "preview": str(files["preview"]) if "preview" in files else None,
        "times": list(result.times),
        "rho": result.rho,
        "threads": result.threads,
        "estimated_seconds": None if estimated is None else round(estimated, 3),
    }
