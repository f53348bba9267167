"""Plans made ahead of time, for other machines: TensorRT for RTX builds on a laptop or in CI, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from ..bundle.reader import Bundle
from ..errors import EngineError
from ..registry import ENGINES, engine_class
from ..tensorrt.folder import Entry, PlanFolderWriter
from ..tensorrt.plans import GraphPlans
from ..tensorrt.profile import Ranges, between, largest
from ..tensorrt.progress import BuildProgress
from ..tensorrt.settings import BuildSettings, workspace_limit
from ..tensorrt.targets import refusal, to_text
from .sizes import Sizes, plan_shapes

if TYPE_CHECKING:
    from ..engine import Progress
    from ..tensorrt.library import TensorRt


class Made(NamedTuple):
    """A plan of a graph, and the seconds that it took; no plan: `skipped` says why this graph runs elsewhere."""

    graph: str
    entry: Entry | None
    seconds: float
    skipped: str | None = None


def library_of(engine: str) -> TensorRt:
    """The library behind an engine whose plans can be built without a GPU. Raises EngineError for any other."""
    classes = {name: engine_class(name, "cuda") for name, kinds in ENGINES.items() if "cuda" in kinds}
    libraries = {name: getattr(found, "library", None) for name, found in classes.items()}
    able = [name for name, library in libraries.items() if library is not None and not library.needs_gpu_to_build]
    if engine not in able:
        raise EngineError(
            f"Plans for other machines are built by the engine {' or '.join(able)}, not by {engine}: add "
            f"--engine {able[0]}."
        )
    return cast("TensorRt", libraries[engine])


def build_plans(
    bundle: Bundle, engine: str, sizes: Sizes, targets: tuple[str, ...], out: Path, progress: Progress | None = None
) -> Iterator[Made]:
    """Builds the plans of all graphs for these sizes and compute capabilities into the new folder `out`; yields each.

    Everything is checked before the first is built. The folder appears when all are there. Raises EngineError, and
    ValueError for a size that the model cannot make.
    """
    library, able = library_of(engine), engine_class(engine, "cuda")
    shapes = {graph: plan_shapes(bundle, graph, sizes) for graph in bundle.manifest.graphs}
    skipped: dict[str, str] = {}
    for graph, info in bundle.manifest.graphs.items():
        if not able.takes(info):
            stored = f", stored in {info.storage}" if info.storage else ""
            skipped[graph] = f"it is {info.precision}{stored}, which another engine runs"
            continue
        reason = refusal(info.precision, targets)
        if reason is not None:
            raise EngineError(f"Graph {graph} cannot be built for {to_text(targets)}: {reason}.")
    settings = BuildSettings(workspace_limit(), targets=targets)
    with PlanFolderWriter(out) as folder:
        for graph in bundle.manifest.graphs:
            start = perf_counter()
            if graph in skipped:
                yield Made(graph, None, 0.0, skipped[graph])
                continue
            plans = GraphPlans(bundle, graph, library)
            for number, triple in enumerate(shapes[graph], 1):
                write = partial(_write, plans, between(*triple), settings, progress)
                entry = folder.add(f"{graph}.plan" if number == 1 else f"{graph}-{number}.plan", write)
                yield Made(graph, entry, perf_counter() - start)
                start = perf_counter()


def _write(
    plans: GraphPlans, ranges: Ranges, settings: BuildSettings, progress: Progress | None, out: BinaryIO
) -> tuple[dict[str, str], dict[str, int]]:
    model = plans.lowered(largest(ranges))
    built = plans.build(model, ranges, settings, None, BuildProgress(plans.graph, progress), out)
    return plans.key(model, ranges, ("any", ""), settings), built.figures
