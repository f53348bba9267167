"""How much work and memory a run needs, told before anything is loaded.

    needed = estimate(bundle, width=832, height=480, frames=81, engine="auto")
    needed.stages["backbone"].flops, needed.peak_bytes, needed.nfe

Operations are counted from the graphs at the asked size. Memory is that of an engine on a CPU, each as it holds a graph
(`holding`); `docs/speed.md` compares the figures with real runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import astuple, dataclass, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..bundle.graph_file import parse_graph
from ..cache_folder import Facts, code_key
from ..device.gpu import split_device
from ..errors import BundleError, EngineError
from ..holding import ONNXRUNTIME, Holding
from ..registry import choose, engine_class
from .system_memory import available_bytes
from .tiling import tile_size, tile_starts

if TYPE_CHECKING:
    from ..bundle.manifest import Manifest, TensorSpec
    from ..bundle.reader import Bundle

__all__ = ["STAGES", "TOGETHER", "Estimate", "StageEstimate", "available_bytes", "estimate", "together_with"]

Memory = Literal["all", "low"]

STAGES = {
    "encoder": ("encoder",),
    "text_encoder": ("text_encoder",),
    "backbone": ("backbone",),
    "flow_head": ("flow_head",),
    "backbone_2": ("backbone_2",),
    "flow_head_2": ("flow_head_2",),
    "update": ("update",),
    "decoder": ("decoder_first", "decoder_step"),
}
"""Stage -> its graphs. The second transformer of a model that has two makes some of the calls of the first, which are
counted there."""

BASE_BYTES = 100_000_000  # Python, numpy, PyAV, onnx and an engine before any graph
TOGETHER = (
    ("encoder",),
    ("text_encoder",),
    ("backbone", "flow_head", "update"),
    ("backbone_2", "flow_head_2", "update"),
    ("decoder",),
)
"""The stages that are loaded at the same time in memory mode "low"."""


def together_with(graph: str) -> tuple[str, ...]:
    """The graphs, this one among them, that are loaded at the same time in memory mode "low"."""
    graphs = (tuple(each for stage in stages for each in STAGES[stage]) for stages in TOGETHER)
    return next((each for each in graphs if graph in each), (graph,))


@dataclass(frozen=True)
class StageEstimate:
    """One stage: `flops` of one call, how many `calls`, its `parameters`, and bytes.

    The decoder's call is the whole clip, or one tile of a large still. `weight_bytes` are the weights as the engine
    holds them, `activation_bytes` what it needs while it runs and keeps for the next run, `io_bytes` the buffers of the
    runtime around it.
    """

    flops: int
    calls: int
    parameters: int
    weight_bytes: int
    activation_bytes: int
    io_bytes: int

    @property
    def total_bytes(self) -> int:
        """Of the stage on its own."""
        return self.weight_bytes + self.activation_bytes + self.io_bytes


@dataclass(frozen=True)
class Estimate:
    """A run: its stages (those that the bundle has), memory in bytes, and evaluations of the whole model (`nfe`)."""

    stages: dict[str, StageEstimate]
    memory: Memory
    nfe: float
    program_bytes: int = 0  # of the engines' libraries and compiled graphs, whatever the size of the run

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return sum(stage.flops * stage.calls for stage in self.stages.values())

    @property
    def peak_bytes(self) -> int:
        """Memory of the process at its peak, in the memory mode that the estimate was made for."""
        return self.peak(self.memory)

    def peak(self, memory: Memory) -> int:
        """As `peak_bytes`, for either mode: "all" keeps what it has loaded, "low" frees each stage after its use."""
        sizes = {name: stage.total_bytes for name, stage in self.stages.items()}
        base = BASE_BYTES + self.program_bytes
        if memory == "all":
            return base + sum(sizes.values())
        return base + max(sum(sizes.get(name, 0) for name in together) for together in TOGETHER)


def estimate(
    bundle: Bundle,
    *,
    width: int,
    height: int,
    frames: int,
    steps: int | None = None,
    inner_steps: int | None = None,
    guidance_passes: int = 1,
    memory: Memory = "all",
    from_picture: bool = False,
    engine: str = "onnxruntime",
    device: str = "auto",
) -> Estimate:
    """Work and memory of one run of `frames` frames of `width` x `height` pixels; None takes the bundle's step counts.

    `guidance_passes` is 2 with classifier-free guidance, of a Transition Model as two rows of one call. `memory` "all"
    keeps every graph loaded, "low" has the text encoder, then backbone and flow head, then the decoder.
    `from_picture`: the run starts from a picture, which the graph `encoder` reads. Whether the model was trained for
    these steps is not asked. Memory is that of `engine`, of "auto" as `registry.choose` decides for each graph; what is
    not on a CPU counts as ONNX Runtime there.
    Raises ValueError for a size or count that the model cannot make, BundleError if a graph cannot be sized.
    """
    manifest = bundle.manifest
    sizes = graph_sizes(manifest, width, height, frames)
    steps, inner_steps = step_counts(manifest, steps, inner_steps)
    model, family = manifest.model, manifest.family
    run = family.calls(steps, inner_steps or 1, guidance_passes)
    stored = manifest.text.null_embeds is not None and not getattr(manifest.sampler, "negative_prompt", None)
    tiles = _tiles(manifest, sizes)
    calls = {
        "encoder": tiles,
        "text_encoder": 1 if stored else guidance_passes,
        "backbone": run.backbone,
        "flow_head": run.flow_head,
        "backbone_2": 0,
        "flow_head_2": 0,
        "update": steps,
        "decoder": tiles,
    }
    present = {stage: [name for name in names if name in manifest.graphs] for stage, names in STAGES.items()}
    if not from_picture:
        present["encoder"] = []
    holdings = {stage: _holding(bundle, names[0], engine, device) for stage, names in present.items() if names}
    key = _facts_key(manifest, run.rows, calls, sizes, from_picture, holdings)
    stages = _kept_stages(key, holdings.keys())
    for stage, names in present.items() if not stages else ():
        if names:
            if stage in ("backbone", "flow_head", "backbone_2", "flow_head_2", "update"):
                call_sizes = {**sizes, "batch": run.rows}
            else:
                call_sizes = autoencoder_sizes(manifest, sizes) if stage != "text_encoder" else sizes
            picture = sizes["height"] * sizes["width"] * manifest.latents.spatial_stride**2
            stages[stage] = _stage(bundle, stage, names, calls[stage], call_sizes, picture, holdings[stage])
    if key is not None:
        _FACTS.add({key: {name: astuple(stage) for name, stage in stages.items()}})
    program = max((holding.program for holding in holdings.values()), default=0)
    return Estimate(stages, memory, family.nfe(model, steps, inner_steps or 1, guidance_passes), program)


def _holding(bundle: Bundle, graph: str, engine: str, device: str) -> Holding:
    try:
        name, where = choose(bundle, graph, engine, device)
    except EngineError:  # not to be had here: loading says so
        return ONNXRUNTIME
    return engine_class(name, split_device(where)[0]).holding


_FACTS = Facts("sizes.json")
_CODE = ("cost", "bundle", "bundle/families", ".")


def _facts_key(manifest: Manifest, *asked: object) -> str | None:
    """Names what `estimate` counts for such a bundle and run, as this version counts it; None: it cannot be told."""
    root = Path(__file__).parents[1]
    code = code_key(*(file for folder in _CODE for file in sorted((root / folder).glob("*.py"))))
    text = f"{code} {manifest.model_dump_json()} {asked}"
    return None if code is None else hashlib.sha256(text.encode()).hexdigest()


def _kept_stages(key: str | None, wanted: Set[str]) -> dict[str, StageEstimate]:
    """What was counted before of all the stages `wanted`; nothing where that is not known, or damaged."""
    found = _FACTS.read().get(key) if key is not None else None
    if not isinstance(found, dict) or found.keys() != wanted or not all(map(_are_counts, found.values())):
        return {}
    return {name: StageEstimate(*counts) for name, counts in found.items()}


def _are_counts(counts: object) -> bool:
    return (
        isinstance(counts, list)
        and len(counts) == len(fields(StageEstimate))
        and all(type(count) is int and count >= 0 for count in counts)
    )


def step_counts(manifest: Manifest, steps: int | None, inner_steps: int | None) -> tuple[int, int | None]:
    """Outer and inner steps, the manifest's where None; inner steps are None for a model without an inner flow.

    Raises ValueError.
    """
    sampler = manifest.sampler
    default = manifest.family.inner_steps(sampler)
    if default is None and inner_steps is not None:
        raise ValueError(f"A model of family {manifest.model.family} has no inner steps: leave them out.")
    counts = (sampler.steps if steps is None else steps, default if inner_steps is None else inner_steps)
    if any(count is not None and count < 1 for count in counts):
        raise ValueError("A run has at least 1 step, and at least 1 inner step where the model has them.")
    return counts


def graph_sizes(manifest: Manifest, width: int, height: int, frames: int) -> dict[str, int]:
    """The symbols of the graphs' shapes: latent frames, height and width, tokens, prompt tokens, batch."""
    latents, (patch_frames, patch_height, patch_width) = manifest.latents, manifest.model.patch_size
    stride = latents.spatial_stride
    for side, pixels, unit in (("width", width, stride * patch_width), ("height", height, stride * patch_height)):
        if pixels < unit or pixels % unit:
            raise ValueError(f"A {side} of {pixels} pixels cannot be made: choose a multiple of {unit}.")
    if manifest.family.makes_stills and frames != 1:
        raise ValueError(f"{frames} frames cannot be made: this is a model of stills, which have 1.")
    if frames < 1 or (frames - 1) % latents.temporal_stride:
        raise ValueError(f"{frames} frames cannot be made: choose 1 plus a multiple of {latents.temporal_stride}.")
    grid = ((frames - 1) // latents.temporal_stride + 1, height // stride, width // stride)
    return {
        "batch": 1,
        "frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "tokens": grid[0] // patch_frames * (grid[1] // patch_height) * (grid[2] // patch_width),
        "text": manifest.text.max_length,
    }


def autoencoder_sizes(manifest: Manifest, sizes: dict[str, int]) -> dict[str, int]:
    """`sizes` as encoder and decoder see them: of a large still, those of a tile."""
    if not manifest.family.makes_stills:
        return sizes
    height, width = tile_size(sizes["height"], sizes["width"], manifest.latents.spatial_stride)
    return {**sizes, "height": height, "width": width}


def _tiles(manifest: Manifest, sizes: dict[str, int]) -> int:
    seen, stride = autoencoder_sizes(manifest, sizes), manifest.latents.spatial_stride
    return prod(len(tile_starts(sizes[side], seen[side], stride)) for side in ("height", "width"))


def _stage(
    bundle: Bundle, stage: str, names: list[str], calls: int, sizes: dict[str, int], picture: int, holding: Holding
) -> StageEstimate:
    """`sizes` are those of one call, `picture` the pixels of one frame of the whole."""
    # Not needed where the counts are kept, and then a good part of what a first run would import for them.
    from .operations import flops, peak_activation_bytes, weight_bytes
    from .shapes import infer_shapes

    work = parameters = weights = activations = 0
    for name in names:
        info = bundle.graph_info(name)
        where = str(bundle.graph_path(name))
        model = parse_graph(bundle.read_graph(name), where)
        graph = infer_shapes(model, {spec.name: _resolve(spec, sizes, where) for spec in info.inputs}, where)
        runs = {"decoder_first": 1, "decoder_step": sizes["frames"] - 1}.get(name, 1)
        work += runs * flops(graph, where)
        parameters = max(parameters, sum(graph.tensors[weight].elements for weight in graph.weights))
        if runs:  # a single picture needs no decoder_step
            weights += weight_bytes(graph, holding)
            activations += peak_activation_bytes(graph, holding)
    return StageEstimate(
        work, calls, parameters, weights, activations, _io_bytes(bundle.manifest, stage, sizes, picture)
    )


def _resolve(spec: TensorSpec, sizes: Mapping[str, int], where: str) -> tuple[int, ...]:
    try:
        return spec.resolve(**sizes)
    except KeyError as error:
        raise BundleError(
            f"{where} cannot be sized: nothing says how large {error.args[0]} of {spec.name} is. "
            "Export the bundle again."
        ) from None


def _io_bytes(manifest: Manifest, stage: str, sizes: Mapping[str, int], picture: int) -> int:
    """Buffers of the runtime: inputs and outputs of the graphs, counted once where one graph's are another's."""

    def nbytes(specs: Iterable[TensorSpec]) -> int:
        itemsize = {"bool": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "int64": 8}
        return sum(prod(_resolve(spec, sizes, stage)) * itemsize.get(spec.dtype, 4) for spec in specs)

    graphs = {name: manifest.graphs[name] for name in STAGES[stage] if name in manifest.graphs}
    every = [spec for graph in graphs.values() for spec in (*graph.inputs, *graph.outputs)]
    before = {
        "flow_head": ("backbone",),
        "flow_head_2": ("backbone_2",),
        "update": ("backbone", "flow_head"),
    }.get(stage, ())
    others = [manifest.graphs[name] for name in before if name in manifest.graphs]
    shared = [spec for graph in others for spec in (*graph.inputs, *graph.outputs)]
    every = [spec for spec in every if spec not in shared]
    if stage != "decoder":
        return nbytes(every)
    # The caches pass back and forth between two sets of buffers, where there is a second latent frame; latents come in
    # one buffer for both graphs. The clip lies there in pieces, and once more when they are put together.
    caches = {spec.name.removesuffix("_next"): spec for spec in every if spec.name.startswith("cache_")}
    rest = {(spec.name, spec.shape): spec for spec in every if not spec.name.startswith("cache_")}
    sets = 1 if sizes["frames"] == 1 else 2
    clip = 3 * picture * (1 + (sizes["frames"] - 1) * manifest.latents.temporal_stride)
    return nbytes(rest.values()) + sets * nbytes(caches.values()) + 2 * clip
