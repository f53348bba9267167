"""The two graphs of a Transition Model."""

from __future__ import annotations

from tmd_engines.bundle.families.signature import Shape
from tmd_ref.tim.split import SplitTiM

from .graph import Graph, Interface


def prompt(split: SplitTiM, interface: Interface) -> Graph:
    """What depends on the prompt, or on the class, alone."""
    sides = interface.of("backbone", {"context": _context(split)})
    return Graph("backbone", split.prompt, *sides, vocabulary=(split.config.num_classes or 0) + 1)


def transition(split: SplitTiM, interface: Interface) -> Graph:
    """One whole step."""
    patch = split.config.patch
    sides = interface.of("flow_head", {"context": _context(split)})
    return Graph("flow_head", split.transition, *sides, {"height": patch, "width": patch})


def _context(split: SplitTiM) -> Shape:
    """Of keys and values of all blocks; of a class's row in the table."""
    config = split.config
    if config.num_classes is not None:
        return ("batch", config.dim)
    return (config.num_layers, "batch", "text", 2 * config.dim)
