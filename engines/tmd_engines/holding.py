"""How an engine on a CPU holds a graph in memory, for estimates (`cost.sizing`). Each engine's class names one."""

from __future__ import annotations

from dataclasses import dataclass

WIDENED_BYTES = 1 << 20
"""A weight of 16 bits that takes more than this as float32, and that only products of matrices read, may stay as it is
stored and be widened whenever it is read."""


@dataclass(frozen=True)
class Holding:
    """float16 is float32 in memory, and bfloat16 is too if `widens_bfloat16`; `keeps_products`: except for the weights
    that `WIDENED_BYTES` is about. `float16_weights`: how many times a weight of float16 is there, in float32.
    `copies_inputs`: a graph's inputs are in its own memory once more. `arena`: what the engine takes from the system
    for the tensors between the nodes, against the most that is alive at one time. `program`: bytes of its library, and
    of what it makes of a graph beside the weights, on top of what the process has before.

    docs/speed.md has the runs that the figures come from.
    """

    widens_bfloat16: bool
    keeps_products: bool
    float16_weights: int
    copies_inputs: bool
    arena: float
    program: int


# Pieces that its arena has freed do not fit what comes next: measured from 1.3 (text encoder) to 1.5 (transformer).
ONNXRUNTIME = Holding(True, keeps_products=True, float16_weights=1, copies_inputs=False, arena=1.5, program=0)
# Of a weight in float16 it keeps what it was converted to, and packs that.
OPENVINO = Holding(False, keeps_products=False, float16_weights=2, copies_inputs=True, arena=1.0, program=150_000_000)
