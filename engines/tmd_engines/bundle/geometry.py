"""What the graphs themselves say of patches and blocks, against what the manifest says.

Nothing of a graph's interface depends on these numbers, and still a run does: rotary tables follow the grid of patches,
and with the sides of a patch exchanged they would be wrong without any error. The C++ library has the same rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import BundleError, quote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx

    from .manifest import Manifest
    from .sections import GraphInfo

DENOISER = ("backbone", "flow_head")  # the graphs that `facts` are of

_RENAMES = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})  # of a single number
_ATTENTION = frozenset({"Attention", "Softmax"})  # written in one operator or in primitives

Divisors = tuple[frozenset[int], frozenset[int], frozenset[int]]


class Facts(NamedTuple):
    """Of one graph: what it divides the frames, height and width of its latents by, and its `attentions`."""

    divisors: Divisors
    attentions: int


def facts(model: onnx.ModelProto, info: GraphInfo) -> Facts:
    """What a graph, already checked, says of itself."""
    latents = {spec.name for spec in info.inputs if [symbol for _, symbol in spec.factors()][3:] == ["height", "width"]}
    numbers = dict(_whole_numbers(model))
    sides: dict[str, int] = {}  # a value that is a side of the latents -> 0 frames, 1 height, 2 width
    found: tuple[set[int], set[int], set[int]] = (set(), set(), set())
    for node in model.graph.node:
        first, second = [*list(node.input), "", ""][:2]
        out = node.output[0] if node.output else ""
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Shape" and first in latents and {"start", "end"} <= attributes.keys():
            start, end = attributes["start"].i, attributes["end"].i
            if end == start + 1 and 2 <= start <= 4:
                sides[out] = start - 2
        elif node.op_type in _RENAMES and first in sides:
            sides[out] = sides[first]
        elif node.op_type == "Div" and first in sides and second in numbers:
            found[sides[first]].add(numbers[second])
        elif node.op_type == "Conv" and first in latents and "strides" in attributes:
            for side, stride in zip(found, attributes["strides"].ints, strict=False):
                side.add(stride)
    one, two, three = (frozenset(side - {1}) for side in found)
    return Facts((one, two, three), sum(node.op_type in _ATTENTION for node in model.graph.node))


def check_geometry(manifest: Manifest, known: Mapping[str, Facts], where: str) -> None:
    """Raises BundleError if the patches or the blocks of the manifest, `where`, are not those of its graphs.

    A graph that divides no side says nothing of patches, and one without attention says nothing of blocks, which only
    estimates and the reported number of evaluations depend on.
    """
    model = manifest.model
    for name, each in known.items():
        wanted = tuple({size} - {1} for size in model.patch_size)
        if any(each.divisors) and each.divisors != wanted:
            seen = [max(side, default=1) for side in each.divisors]
            raise BundleError(
                f"{where}: model.patch_size is {list(model.patch_size)}, and graph {quote(name)} divides latents by "
                f"{seen}. {_REMEDY}"
            )
    each_block = manifest.family.attentions_per_block(model)
    for name, blocks in zip(DENOISER, (model.num_layers - model.head_blocks, model.head_blocks), strict=True):
        found = known[name].attentions if name in known else 0
        if found and found != blocks * each_block:
            raise BundleError(
                f"{where}: model.head_blocks {model.head_blocks} of num_layers {model.num_layers} does not agree with "
                f"graph {quote(name)}, which has {found} attentions where a block has {each_block}. {_REMEDY}"
            )


_REMEDY = "Copy the bundle again, or make it again with tmd-export."


def _whole_numbers(model: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """The weights that are one positive number of type int64."""
    for weight in model.graph.initializer:
        if weight.data_type == 7 and len(weight.raw_data) == 8 and not weight.external_data:
            yield weight.name, int.from_bytes(weight.raw_data, "little", signed=True)
