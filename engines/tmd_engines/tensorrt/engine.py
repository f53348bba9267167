"""TensorRT 10 and 11, and TensorRT for RTX, on an NVIDIA GPU: a graph is lowered, checked and built for the sizes that
it is bound to, or taken from a plan that was built before.

Plans are kept in a cache of this user; docs/engines.md says what their key holds. None of this has ever run on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.reader import Bundle
from ..cost.sizing import together_with
from ..device.array import DeviceArray
from ..device.engine import DeviceEngine, Shapes
from ..device.gpu import has_cuda_bindings, has_gpu, split_device
from ..engine import BuildStep, Progress, Step
from ..errors import EngineError, one_line
from .library import FOR_RTX, TENSORRT, TensorRt, use
from .plans import Found, GraphPlans, open_cache
from .profile import between, exactly, to_text
from .progress import BuildProgress
from .scratch import Scratch
from .settings import BuildSettings, workspace_limit
from .targets import refusal_on, runs_on

if TYPE_CHECKING:
    from ..bundle.sections import GraphInfo
    from ..device.cuda import CudaArray
    from .folder import PlanFolder
    from .run import LoadedPlan, Plan

_STREAM_ABOVE = 0.8  # of the device's memory: weights that take more stay on the host and are streamed
_SINCE = {"fp8": (8, 9), "nvfp4": (10, 0)}  # precision -> the first capability that TensorRT computes it on
_SERVER_CARDS = ((8, 0), (9, 0), (10, 0), (10, 3))


def import_cuda() -> Any:
    """Our module over CUDA. Raises EngineError where NVIDIA's bindings are missing."""
    try:
        from ..device import cuda
    except (ImportError, OSError) as error:
        raise EngineError(
            f"TensorRT is here, and the CUDA bindings for Python are not ({error}): {FOR_RTX.install} brings both, and "
            "so does '.[tensorrt]'."
        ) from None
    return cuda


class TensorRtEngine(DeviceEngine):
    """One graph, built once per combination of input shapes or range of them. Buffers are `CudaArray`s."""

    records = True
    storages = (None, "fp32", "fp16")  # blocks of int8 are nothing that TensorRT reads
    library: TensorRt = TENSORRT
    package, install = TENSORRT.module, TENSORRT.install

    @classmethod
    def is_here(cls) -> bool:
        """A GPU, the library and the CUDA bindings for Python."""
        return has_gpu() and super().is_here() and has_cuda_bindings()

    @classmethod
    def note(cls) -> str | None:
        """What it lacks to run here, and the command that mends it."""
        if not has_gpu():
            builds = "" if cls.library.needs_gpu_to_build else "builds plans here, "
            return f"{builds}but no NVIDIA GPU is seen: install its driver"
        return None if has_cuda_bindings() else f"but not the CUDA bindings for Python: {cls.install}"

    @classmethod
    def note_on(cls, nvidia: Mapping[str, Any] | None) -> str | None:
        """See `Engine.note_on`: a driver that is too old, or a card that the library is not for."""
        if nvidia is None:
            return None
        driver = re.match(r"([0-9]{3,4})\.", nvidia["driver"])
        if driver and int(driver[1]) < cls.library.driver:
            return (
                f"but driver {nvidia['driver']} is too old: install {cls.library.driver} or newer "
                "(on Ubuntu: sudo ubuntu-drivers install)"
            )
        for gpu in nvidia["gpus"]:
            unfit = cls._unfit(gpu["compute_capability"])
            if unfit:
                return f"but {gpu['name']} has compute capability {gpu['compute_capability']}, {unfit}"
        return None

    @classmethod
    def _unfit(cls, capability: str) -> str | None:
        return None

    @classmethod
    def check(cls, bundle: Bundle, graph: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Whether the parser of the library that is here takes the graph. Raises EngineError."""
        super().check(bundle, graph, shapes)
        GraphPlans(bundle, graph, cls.library).lowered(shapes)

    def __init__(
        self, bundle: Bundle, graph: str, device: str, threads: int | None, progress: Progress | None = None
    ) -> None:
        info = bundle.graph_info(graph)
        super().__init__(self.library.name, graph, info)
        use(self.library)
        self._cuda = import_cuda()
        self._cuda.use(split_device(device)[1])
        self._device = self._cuda.device()
        self._where = (self._device.name, ".".join(map(str, self._device.capability)))
        self._progress = progress
        reason = self._refusal(info)
        if reason is not None:
            raise EngineError(f"Graph {graph} does not run on {self._device.name}: {reason}.")
        self._plans = GraphPlans(bundle, graph, self.library)
        self._weights = sum(_weight_bytes(bundle, each) for each in self.beside(bundle, graph))
        self._folder: PlanFolder | None = None
        self._loaded: tuple[dict[str, str], LoadedPlan] | None = None

    @classmethod
    def beside(cls, bundle: Bundle, graph: str) -> Iterable[str]:
        """The graphs whose weights are on the GPU together with this one's: at worst, all."""
        return bundle.manifest.graphs

    def _refusal(self, info: GraphInfo) -> str | None:
        if self._device.capability < _SINCE.get(info.precision, (0, 0)):
            return refusal_on(info.precision, self._device.capability)
        return None

    def compile_range(
        self,
        smallest: Mapping[str, tuple[int, ...]],
        best: Mapping[str, tuple[int, ...]],
        largest: Mapping[str, tuple[int, ...]],
    ) -> None:
        """See `Engine.compile_range`."""
        progress = BuildProgress(self.graph, self._progress)
        self._plans.make(between(smallest, best, largest), self._where, self.settings(), progress)

    def use_plans(self, folder: str | Path) -> None:
        """See `Engine.use_plans`."""
        from .folder import PlanFolder

        self._folder = PlanFolder(folder)
        scratch().reserve(max((entry.figures.get("scratch", 0) for entry in self._folder.entries), default=0))

    def array(self, shape: tuple[int, ...], dtype: str) -> CudaArray:
        """See `DeviceEngine.array`."""
        made: CudaArray = self._cuda.CudaArray(shape, dtype)
        return made

    def record(self, work: Callable[[], None]) -> Step:
        """See `Engine.record`: a CUDA graph, or `work` as it is where the library cannot record it."""
        return Recorded(work, self._cuda.stream().record, scratch(), self._say)

    def close(self) -> None:
        """See `Engine.close`."""
        super().close()
        self._loaded = None

    def settings(self) -> BuildSettings:
        """How graphs of this bundle are built on this device. Raises EngineError for a workspace that is no number."""
        return BuildSettings(workspace_limit(), self._weights > _STREAM_ABOVE * self._device.memory)

    def _compile(self, shapes: Shapes) -> BoundPlan:
        named = dict(zip(self.inputs, shapes, strict=True))
        settings, progress = self.settings(), BuildProgress(self.graph, self._progress)
        if self._folder is not None:
            try:
                return self._load(self._plans.in_folder(self._folder, named, self._where, settings), named)
            except EngineError as error:
                progress.say(f"{error}: looking in the cache")
        found = self._plans.in_cache(named, self._where, settings, progress)
        try:
            return self._load(found, named)
        except EngineError as error:
            if found.is_new:
                raise
            progress.say(f"the plan in the cache does not load, and is built anew: {error}")
        return self._load(self._plans.make(exactly(named), self._where, settings, progress), named)

    def _load(self, found: Found, shapes: Mapping[str, tuple[int, ...]]) -> BoundPlan:
        from .run import LoadedPlan, Plan

        if self._loaded is None or self._loaded[0] != found.key:
            self._loaded = None  # two copies of a large model do not fit side by side
            self._loaded = (found.key, LoadedPlan(found.content))
        kernels_key = {
            **found.key,
            "title": f"kernels of {found.key['title']}",
            "device": self._where[0],
            "compute capability": self._where[1],
            "plan for": found.key["shapes"],
            "shapes": to_text(exactly(shapes)),
        }
        plans = open_cache()
        try:
            plan = Plan(self._loaded[1], shapes, plans.load(kernels_key))
        except EngineError:
            self._loaded = None  # another plan may lie there under this key the next time
            raise
        return BoundPlan(plan, scratch(), lambda kernels: plans.store(kernels_key, kernels))

    def _runner(
        self, compiled: BoundPlan, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]
    ) -> Callable[[], None]:
        addresses = {name: array.address for name, array in (*inputs.items(), *outputs.items())}
        return lambda: compiled.run(addresses, self._cuda.stream())

    def _say(self, message: str) -> None:
        if self._progress is not None:
            self._progress(BuildStep(self.graph, 1.0, 0.0, None, message))


class TensorRtForRtxEngine(TensorRtEngine):
    """TensorRT for RTX: the same, with plans that any RTX card takes and that are built without a GPU too."""

    library = FOR_RTX
    package, install = FOR_RTX.module, FOR_RTX.install

    @classmethod
    def beside(cls, bundle: Bundle, graph: str) -> Iterable[str]:
        """Those of its stage: consumer cards hold large models one stage after the other, and a plan made ahead of time
        serves cards that could hold more."""
        return [name for name in together_with(graph) if name in bundle.manifest.graphs]

    @classmethod
    def prefers(cls, info: GraphInfo, size: int) -> bool:
        """On consumer cards; on those for servers where TensorRT, which knows them, is not installed."""
        if not cls.takes(info):
            return False
        try:
            capability = import_cuda().capability_of(0)
        except EngineError:  # a driver that does not work; `doctor` says so
            return False
        if not runs_on((), capability) or refusal_on(info.precision, capability) is not None:
            return False
        return capability not in _SERVER_CARDS or not TensorRtEngine.is_here()

    def _refusal(self, info: GraphInfo) -> str | None:
        return refusal_on(info.precision, self._device.capability)

    @classmethod
    def _unfit(cls, capability: str) -> str | None:
        if capability == "7.5":
            return "for which our graphs cannot be built: --engine onnxruntime (pip install '.[gpu]')"
        major, _, minor = capability.partition(".")
        if runs_on((), (int(major), int(minor))):
            return None
        return f"which NVIDIA does not list for {FOR_RTX.title}: --engine tensorrt ({TENSORRT.install})"


class BoundPlan:
    """A plan with its share of the scratch memory; after its first run, what was compiled meanwhile is kept."""

    def __init__(self, plan: Plan, scratch: Scratch, keep: Callable[[bytes], None]) -> None:
        self._plan, self._scratch, self._keep = plan, scratch, keep
        self._moves: int | None = None
        self._has_run = False
        self._not_recordable: str | None = None
        scratch.reserve(plan.scratch)

    def run(self, addresses: Mapping[str, int], stream: Any) -> None:
        """Returns when the outputs are written; while the stream records, at once. Raises EngineError."""
        if stream.recording and self._not_recordable is not None:
            raise EngineError(self._not_recordable)
        if self._moves != self._scratch.moves:
            self._scratch.reserve(self._plan.scratch)  # it may be gone since somebody wanted more than there was
            self._plan.use_scratch(self._scratch.address, self._scratch.size)
            self._moves = self._scratch.moves
        self._plan.enqueue(addresses, stream.handle)
        stream.wait()
        if not self._has_run and not stream.recording:
            self._has_run = True
            self._not_recordable = self._plan.not_recordable(stream.handle)
            kernels = self._plan.kernels()
            if kernels is not None:
                self._keep(kernels)


class Recorded:
    """Work as one launch, recorded at its first call, and again when the scratch memory has moved.

    Where it cannot be recorded, the reason is told once and the work is done step by step.
    """

    def __init__(
        self,
        work: Callable[[], None],
        record: Callable[[Callable[[], None]], Step],
        scratch: Scratch,
        say: Callable[[str], None],
    ) -> None:
        self._work, self._record, self._scratch, self._say = work, record, scratch, say
        self._step: Step | None = None
        self._moves: int | None = None
        self._recordable = True

    def __call__(self) -> None:
        if self._recordable and self._moves != self._scratch.moves:
            self._step = None  # the memory that it was recorded with is gone
            try:
                self._step, self._moves = self._record(self._work), self._scratch.moves
            except EngineError as error:
                self._say(f"steps are launched one by one, not as one CUDA graph: {one_line(error)}")
                self._recordable = False
        (self._step or self._work)()


@cache
def scratch() -> Scratch:
    """The scratch memory of this process."""
    cuda = import_cuda()
    return Scratch(lambda size: cuda.CudaArray((size,), "uint8"))


def _weight_bytes(bundle: Bundle, graph: str) -> int:
    info = bundle.graph_info(graph)
    return sum(bundle.manifest.files[name].size for name in (info.file, info.data) if name)
