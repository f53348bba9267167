"""What a graph takes and gives: names, types and shapes as functions of the manifest's geometry.

It is data, because the C++ library has the same table (`runtime/cpp/tools/make_signatures.py` writes it).

A dimension is a number, or names joined by `*`: numbers of the geometry ("channels", "half_head": `geometry`) and at
most one size that is free until a run ("batch", "frames", "height", "width", "tokens", "text"). "stride*height" of a
manifest with `spatial_stride` 8 is its "8*height". The shape `PASSED` is the business of the two graphs that share the
tensor: any, but the same on both sides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import quote

if TYPE_CHECKING:
    from ..manifest import Manifest
    from ..sections import GraphInfo, TensorSpec

FREE = ("batch", "frames", "height", "width", "tokens", "text")
PASSED = ("...",)

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Tensor:
    """One input or output. `when` names a flag of the manifest (`flags`) that must be set for it to be there."""

    shape: Shape
    dtype: str = "float32"
    when: str = ""


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one graph by name.

    `caches` are numbered tensors that pass from call to call: "write" for outputs `cache_NN`, "step" for inputs
    `cache_NN` and outputs `cache_NN_next`, as many, of the same types and shapes.
    """

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    caches: str = field(default="")


LATENTS = Tensor(("batch", "channels", "frames", "height", "width"))
STILL = Tensor(("batch", "channels", 1, "height", "width"))
TIME = Tensor(("batch",))
ROPE = {name: Tensor(("tokens", "half_head")) for name in ("rope_cos", "rope_sin")}
FEATURES = Tensor(("batch", "tokens", "dim"))
CONTEXT = Tensor(("batch", "text", "dim"))
PICTURE = Tensor(("batch", 1, "stride*height", "stride*width", 3), "uint8")
MAGNITUDE = Tensor((1,))  # a mean of absolute values: NaN or Inf exactly if one of them is
PROMPT = Tensor(("batch", "text", "text_dim"))
HOLDS = "first_frame"
"""The flag of a model that can hold a picture as its first latent frame."""
HELD = {"held": Tensor(("frames",), when=HOLDS)}
"""1 for a latent frame that is held, and 0 for the others."""


def update_signature(latents: Tensor, holds: bool = False) -> Signature:
    """The graph `update`, which makes the next x of the model's velocity: see docs/bundle.md. With `holds` it puts
    `picture` into the held frames, where the model is one that holds any."""
    names = ("x", "velocity", "negative", "noise", "before_1", "before_2")
    inputs = {**dict.fromkeys(names, latents), "coefficients": Tensor((7,))}
    if holds:
        inputs |= {**HELD, "picture": Tensor(STILL.shape, when=HOLDS)}
    return Signature(inputs, {"x_next": latents, "data": latents, "magnitude": MAGNITUDE})


TEXT_ENCODER = Signature(
    {
        "input_ids": Tensor(("batch", "text"), "int64", "ids"),
        "token_embeds": Tensor(("batch", "text", "table_dim"), when="table"),
        "attention_mask": Tensor(("batch", "text"), "int64", "padded"),
    },
    {"prompt_embeds": PROMPT},
)
AUTOENCODER = {
    "encoder": Signature({"frames": PICTURE}, {"latents": STILL}),
    "decoder_first": Signature(
        {"latents": STILL},
        {"frames": PICTURE, "magnitude": MAGNITUDE},
        caches="write",
    ),
    "decoder_step": Signature(
        {"latents": STILL},
        {
            "frames": Tensor(("batch", "frame_stride", "stride*height", "stride*width", 3), "uint8"),
            "magnitude": MAGNITUDE,
        },
        caches="step",
    ),
}


def geometry(manifest: Manifest) -> dict[str, int]:
    """The numbers that shapes are made of."""
    table = manifest.text.embedding
    return {
        "channels": manifest.latents.channels,
        "stride": manifest.latents.spatial_stride,
        "frame_stride": manifest.latents.temporal_stride,
        "dim": manifest.model.dim,
        "half_head": manifest.model.head_dim // 2,
        "text_dim": manifest.text.dim,
        "table_dim": 1 if table is None else table.dim,
    }


def check_interfaces(
    manifest: Manifest, signatures: Mapping[str, Signature], numbers: Mapping[str, int], flags: Collection[str]
) -> None:
    """Raises ValueError unless every graph of the manifest is one of `signatures` and has exactly its tensors."""
    for name, graph in manifest.graphs.items():
        signature = signatures.get(name)
        if signature is None:
            raise ValueError(f"there is no graph {quote(name)} in family {quote(manifest.model.family)}")
        for side in ("input", "output"):
            specs, wanted = (getattr(each, f"{side}s") for each in (graph, signature))
            there = {tensor: spec for tensor, spec in wanted.items() if not spec.when or spec.when in flags}
            caches = signature.caches == "step" or (signature.caches == "write" and side == "output")
            others = {spec.name: spec for spec in specs if not (caches and spec.name.startswith("cache_"))}
            _check_side(side, name, others, there, numbers)
    _check_caches(manifest.graphs)
    _check_passed(manifest.graphs, signatures)


def resolved(shape: Shape, numbers: Mapping[str, int]) -> Shape:
    """A shape as a manifest writes it: numbers, names, and multiples of names."""
    return tuple(_resolved(dimension, numbers) for dimension in shape)


def _resolved(dimension: int | str, numbers: Mapping[str, int]) -> int | str:
    if isinstance(dimension, int):
        return dimension
    factor, symbol = 1, ""
    for part in dimension.split("*"):
        if part in FREE:
            symbol = part
        else:
            factor *= numbers[part]
    if not symbol:
        return factor
    return symbol if factor == 1 else f"{factor}*{symbol}"


def _check_side(
    side: str, graph: str, specs: Mapping[str, TensorSpec], wanted: Mapping[str, Tensor], numbers: Mapping[str, int]
) -> None:
    for name in (*wanted, *specs):
        where = f"{side} {quote(name)} of graph {quote(graph)}"
        if name not in specs:
            raise ValueError(f"there is no {where}, which the family needs")
        if name not in wanted:
            raise ValueError(f"{quote(name)} is not an {side} of graph {quote(graph)} in this family")
        have, want = specs[name], wanted[name]
        shape = tuple(have.shape) if want.shape == PASSED else resolved(want.shape, numbers)
        if have.dtype != want.dtype or tuple(have.shape) != shape:
            raise ValueError(
                f"the {where} is {have.dtype} {_shown(have.shape)}, and the model's sizes say {want.dtype} "
                f"{_shown(shape)}"
            )
        unknown = [symbol for _, symbol in have.factors() if symbol is not None and symbol not in FREE]
        if unknown:
            raise ValueError(f"the {where} has a size {quote(unknown[0])} that no run knows")


def _shown(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _caches(specs: tuple[TensorSpec, ...], suffix: str = "") -> dict[str, tuple[str, Shape]]:
    return {
        spec.name.removesuffix(suffix) if suffix else spec.name: (spec.dtype, tuple(spec.shape))
        for spec in specs
        if spec.name.startswith("cache_")
    }


def _check_caches(graphs: Mapping[str, GraphInfo]) -> None:
    first, step = graphs.get("decoder_first"), graphs.get("decoder_step")
    every = [_caches(first.outputs)] if first is not None else []
    if step is not None:
        if any(spec.name.startswith("cache_") and not spec.name.endswith("_next") for spec in step.outputs):
            raise ValueError("the caches that graph 'decoder_step' writes must end in '_next'")
        every += [_caches(step.inputs), _caches(step.outputs, "_next")]
    if any(caches != every[0] for caches in every):
        raise ValueError("graphs 'decoder_first' and 'decoder_step' do not pass the same caches")
    for dtype, shape in every[0].values() if every else ():
        symbols = {str(dimension).rpartition("*")[2] for dimension in shape if isinstance(dimension, str)}
        if dtype not in ("float32", "float16") or not symbols <= {"batch", "height", "width"}:
            raise ValueError("a cache is float32 or float16, of fixed sizes, 'batch', 'height' and 'width'")


def _check_passed(graphs: Mapping[str, GraphInfo], signatures: Mapping[str, Signature]) -> None:
    """What one graph hands to another has one shape."""
    shapes: dict[str, tuple[str, Shape]] = {}
    for name, graph in graphs.items():
        signature = signatures[name]
        for specs, wanted in ((graph.inputs, signature.inputs), (graph.outputs, signature.outputs)):
            for spec in specs:
                if spec.name in wanted and wanted[spec.name].shape == PASSED:
                    owner, shape = shapes.setdefault(spec.name, (name, tuple(spec.shape)))
                    if tuple(spec.shape) != shape:
                        raise ValueError(
                            f"graphs {quote(owner)} and {quote(name)} disagree on the shape of {spec.name}"
                        )
