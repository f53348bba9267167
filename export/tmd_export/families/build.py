"""The graph of a part, without memory for its weights, and where these come from."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from torch import nn

from tmd_engines.bundle.families import FAMILIES as ENGINE_FAMILIES
from tmd_engines.bundle.manifest import LatentInfo, Manifest, TextInfo

from ..graphs.autoencoder import with_caches
from ..graphs.graph import Graph, Interface
from ..graphs.update import update
from ..parts import MODEL_OF, UPDATE
from ..sources.source import Source
from ..weights.precision import lower
from ..weights.weights import Weights
from . import FAMILIES


def build(source: Source, part: str, precision: str = "fp32", blocks: int | None = None) -> tuple[Graph, Weights]:
    """The graph `part` on the meta device and where its weights come from.

    `blocks`: keep this many of its transformer blocks, spread from the first to the last, each with its own weights.
    """
    family, interface = FAMILIES[source.family], interface_of(source)
    if part == UPDATE:
        graph = update(interface)
        return graph, Weights(source, "", {}, graph.module)
    which = MODEL_OF[part]
    model = source.module(which)
    names = {id(weight): name for name, weight in model.named_parameters()}
    graph = family.builders()[part](model, interface)
    if blocks is not None:
        shorten(graph.module, blocks)
    found = {name: names[id(weight)] for name, weight in graph.module.named_parameters()}
    lower(graph.module, precision, family.exact)
    graph = with_caches(graph)
    return graph, Weights(source, which, found, graph.module)


def interface_of(source: Source) -> Interface:
    """What the graphs of this source take and give."""
    family, stated = ENGINE_FAMILIES[source.family], cast(Manifest, sections(source))
    return Interface(family.signatures, family.geometry(stated), family.flags(stated))


def sections(source: Source) -> SimpleNamespace:
    """`model`, `latents` and `text` of the manifest that a bundle of this source will have."""
    model = {"name": source.model, "family": source.family, **source.model_entry()}
    return SimpleNamespace(
        model=_checked(ENGINE_FAMILIES[source.family].model, model),
        latents=_checked(LatentInfo, source.latents_entry()),
        text=_checked(TextInfo, source.text_entry()),
    )


def _checked(kind: Any, entry: dict[str, Any]) -> Any:
    return kind.model_validate_json(json.dumps(entry))


def blocks_of(module: nn.Module) -> tuple[nn.Module, nn.ModuleList] | None:
    """The list of transformer blocks somewhere in `module` and who holds it; None if there is none."""
    for owner in module.modules():
        blocks = getattr(owner, "blocks", None)
        if isinstance(blocks, nn.ModuleList):
            return owner, blocks
    return None


def kept_blocks(blocks: nn.ModuleList, count: int) -> list[int]:
    """Numbers of `count` blocks, the first and the last among them, and of the first of each `kind` that they have."""
    kinds = [getattr(block, "kind", None) for block in blocks]
    spread = {round(k * (len(blocks) - 1) / max(1, count - 1)) for k in range(count)}
    return sorted(spread | {kinds.index(kind) for kind in kinds})


def shorten(module: nn.Module, count: int) -> None:
    """Leaves `count` of the blocks of `module`. Raises ValueError if it has none."""
    found = blocks_of(module)
    if found is None:
        raise ValueError("this graph has no blocks to leave out")
    owner, blocks = found
    owner.blocks = nn.ModuleList(blocks[k] for k in kept_blocks(blocks, count))
