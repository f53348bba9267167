"""The plans of one graph: what their keys hold, where they are looked for, how they are made. Needs no GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from ..bundle.graph_file import parse_graph
from ..bundle.reader import Bundle, format_size
from ..cache_folder import cache_folder
from ..device.plan_cache import PlanCache, map_file
from ..errors import EngineError
from . import library as libraries
from .float4 import check_version, use_dynamic_quantize
from .fusion import mark_decomposable
from .lint import check_graph
from .lowering import lower
from .profile import Ranges, Shapes, contains, exactly, from_text, largest, to_text
from .targets import to_text as targets_text

if TYPE_CHECKING:
    import onnx

    from .build import Built
    from .folder import PlanFolder
    from .library import TensorRt
    from .progress import BuildProgress
    from .settings import BuildSettings

_MAX_ENTRY, _MAX_FOLDER = 32 << 30, 64 << 30
_SIZES = ("title", "shapes")  # entries that are equal in these are for the same graph and sizes

Key = dict[str, str]


class Found(NamedTuple):
    """A plan, ready to be loaded, and its key. `is_new`: it was built just now."""

    key: Key
    content: memoryview
    is_new: bool = False


def lowered_graph(model: onnx.ModelProto, shapes: Shapes, version: tuple[int, int], where: str) -> onnx.ModelProto:
    """A copy of `model` for TensorRT `version`, checked against what older parsers take. Raises EngineError.

    `shapes` are the largest that it will run with.
    """
    check_version(model, version, where)
    lowered: onnx.ModelProto = type(model)()
    lowered.CopyFrom(model)
    lower(lowered, version, shapes)
    check_graph(lowered, shapes, version, where)
    mark_decomposable(lowered, shapes)
    use_dynamic_quantize(lowered, where)
    return lowered


def plan_key(
    title: str,
    hashes: str,
    model: bytes,
    engine: str,
    device: tuple[str, str],
    precision: str,
    ranges: Ranges,
    settings: BuildSettings,
) -> Key:
    """Everything that a plan depends on. `hashes` are those of graph and weights, `model` is the lowered graph,
    `engine` the library's name and version, `device` the GPU's name and compute capability, or what stands for many."""
    return {
        "title": title,
        "graph": hashes,
        "lowered": hashlib.sha256(model).hexdigest(),
        "engine": engine,
        "device": device[0],
        "compute capability": device[1],
        "precision": precision,
        "shapes": to_text(ranges),
        "flags": settings.flags(),
    }


def open_cache() -> PlanCache:
    """The plans of this user."""
    folder = cache_folder()
    return PlanCache(None if folder is None else folder / "tensorrt", _MAX_ENTRY, _MAX_FOLDER)


class GraphPlans:
    """Plans of a graph for one library, which is that of this process from here on. Raises EngineError, BundleError."""

    def __init__(self, bundle: Bundle, graph: str, library: TensorRt) -> None:
        libraries.use(library)
        info = bundle.graph_info(graph)
        self.graph, self.precision, self.library = graph, info.precision, library
        self._path = bundle.graph_path(graph)
        self._model = parse_graph(bundle.read_graph(graph), str(self._path))
        self._model.DiscardUnknownFields()  # what our checks could not see, TensorRT shall not see either
        files = bundle.manifest.files
        self._hashes = " ".join(files[name].sha256 for name in (info.file, info.data) if name)
        self.title = f"{bundle.manifest.model.name} {graph}"

    def lowered(self, shapes: Shapes) -> bytes:
        """The graph as the library gets it, for sizes up to these. Raises EngineError if it would be refused."""
        model = lowered_graph(self._model, shapes, self.library.operators(), str(self._path))
        return model.SerializeToString(deterministic=True)

    def key(self, model: bytes, ranges: Ranges, device: tuple[str, str], settings: BuildSettings) -> Key:
        """See `plan_key`; a plan of TensorRT for RTX is for the settings' targets, whatever the GPU."""
        if not self.library.needs_gpu_to_build:
            device = ("any", targets_text(settings.targets))
        engine = f"{self.library.name} {self.library.version()}"
        return plan_key(self.title, self._hashes, model, engine, device, self.precision, ranges, settings)

    def build(
        self,
        model: bytes,
        ranges: Ranges,
        settings: BuildSettings,
        timing: bytes | None,
        progress: BuildProgress,
        out: BinaryIO,
    ) -> Built:
        """See `build.build`."""
        from .build import build

        return build(model, str(self._path), ranges, settings, timing, progress, out)

    def in_folder(self, folder: PlanFolder, shapes: Shapes, device: tuple[str, str], wanted: BuildSettings) -> Found:
        """The plan of `folder` that takes these shapes on this GPU. Raises EngineError saying what there is instead."""
        closest: list[str] | None = None
        for entry in folder.entries:
            if entry.key.get("title") != self.title or not _takes(entry.key, shapes):
                continue
            ranges = from_text(entry.key["shapes"])
            here = self.key(self.lowered(largest(ranges)), ranges, device, wanted)
            found = folder.differences(entry, here, device)
            if not found:
                return Found(entry.key, folder.read(entry))
            if closest is None or len(found) < len(closest):
                closest = found
        if closest is None:
            raise EngineError(f"{folder.path} has no plan of {self.title} for {to_text(exactly(shapes))}")
        raise EngineError(f"the plan of {self.title} in {folder.path} is for something else ({'; '.join(closest[:2])})")

    def in_cache(
        self, shapes: Shapes, device: tuple[str, str], settings: BuildSettings, progress: BuildProgress
    ) -> Found:
        """The plan for these sizes from the user's cache: one for just these, or for a range that has them in it.

        Where there is none it is built and put there; another process that wants the same one waits.
        """
        plans, exact = open_cache(), exactly(shapes)
        model = self.lowered(shapes)
        key = self.key(model, exact, device, settings)
        with plans.locked(key):
            content = plans.map(key)
            if content is not None:
                return Found(key, content)
            for other in plans.known():
                if _alike(other, key) and _takes(other, shapes):
                    ranges = from_text(other["shapes"])
                    if other == self.key(self.lowered(largest(ranges)), ranges, device, settings):
                        content = plans.map(other)
                        if content is not None:
                            return Found(other, content)
            for difference in plans.differences(key, _SIZES)[:2]:
                progress.say(f"the plan in the cache is for something else ({difference}): building anew")
            return self._make(plans, key, model, exact, settings, progress)

    def make(self, ranges: Ranges, device: tuple[str, str], settings: BuildSettings, progress: BuildProgress) -> Found:
        """A plan for a range of sizes, built whether there is one or not, and put into the cache."""
        plans, model = open_cache(), self.lowered(largest(ranges))
        key = self.key(model, ranges, device, settings)
        with plans.locked(key):
            return self._make(plans, key, model, ranges, settings, progress)

    def _make(
        self,
        plans: PlanCache,
        key: Key,
        model: bytes,
        ranges: Ranges,
        settings: BuildSettings,
        progress: BuildProgress,
    ) -> Found:
        timing_key = {name: key[name] for name in ("engine", "device", "compute capability")} | {"kind": "timing cache"}
        with plans.work_file() as file:
            built = self.build(model, ranges, settings, plans.load(timing_key), progress, file)
            if built.timing is not None:
                plans.store(timing_key, built.timing)
            plans.store_file(key, file)
            content = map_file(file)
        summary = f"built, {format_size(len(content))}" + _figures(built.figures)
        progress.say(summary + ("" if plans.usable else ", and not kept: the cache is off"))
        return Found(key, content, is_new=True)


def _figures(figures: Mapping[str, int]) -> str:
    shown = [f"{name} {format_size(figures[name])}" for name in ("weights", "scratch") if name in figures]
    return f" ({', '.join(shown)} on the GPU)" if shown else ""


def _takes(key: Mapping[str, str], shapes: Shapes) -> bool:
    try:
        return contains(from_text(key.get("shapes", "")), shapes)
    except ValueError:
        return False


def _alike(other: Mapping[str, str], key: Mapping[str, str]) -> bool:
    """Whether two plans differ in nothing but sizes, and the marks that depend on them."""
    return {name for name in {*other, *key} if other.get(name) != key.get(name)} <= {"shapes", "lowered"}
