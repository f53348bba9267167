"""A graph to export: a torch module, and its inputs and outputs as the manifest will state them.

Names and shapes come from the signatures of the model's family in `tmd_engines`, which every host reads too. The rest
of the export (tracing, rules, comparison) reads this interface and knows no model. Letters in shapes as in
`tmd_ref.wan`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tmd_engines import TensorSpec
from tmd_engines.bundle.families.signature import PASSED, Shape, Signature, resolved
from tmd_engines.bundle.families.signature import Tensor as Stated

Specs = tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Graph:
    """A module to export and its interface in the order of its arguments and results.

    `multiples`: symbols whose sizes come in steps (height in patches). `vocabulary`: ids below it are valid, for graphs
    that take ids.
    """

    name: str
    module: nn.Module
    inputs: Specs
    outputs: Specs
    multiples: Mapping[str, int] = field(default_factory=dict)
    vocabulary: int = 1

    def __post_init__(self) -> None:
        self.module.eval()

    def sizes(self, **dims: int) -> dict[str, int]:
        """`dims` and the number of tokens that those of them make which are free in this graph."""
        tokens, free = 1, {symbol for spec in self.inputs for _, symbol in spec.factors()}
        for side in ("frames", "height", "width"):
            tokens *= dims.get(side, 1) // self.multiples.get(side, 1) if side in free else 1
        return {**dims, "tokens": tokens}

    def random_inputs(self, seed: int, **dims: int) -> dict[str, Tensor]:
        """Inputs for these sizes: normal values, times in 0..1 with r <= s, angles, ids, bytes, a ragged mask; the
        first frame is held."""
        generator = torch.Generator().manual_seed(seed)
        sizes = self.sizes(**dims)
        angles: Tensor | None = None
        given: dict[str, Tensor] = {}
        for spec in self.inputs:
            shape = spec.resolve(**sizes)
            if spec.name in ("input_ids", "labels"):
                given[spec.name] = torch.randint(0, self.vocabulary, shape, generator=generator)
            elif spec.name == "attention_mask":
                lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
                given[spec.name] = (torch.arange(shape[1]) < lengths).long()
            elif spec.name == "held":
                given[spec.name] = (torch.arange(*shape) == 0).float()
            elif spec.name in ("t", "s"):
                given[spec.name] = torch.rand(shape, generator=generator)
            elif spec.name == "r":
                given[spec.name] = given["s" if "s" in given else "t"] * torch.rand(shape, generator=generator)
            elif spec.name.startswith("rope_"):
                angles = 6.3 * torch.rand(shape, generator=generator) if angles is None else angles
                given[spec.name] = angles.cos() if spec.name == "rope_cos" else angles.sin()
            elif spec.dtype == "uint8":
                given[spec.name] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            else:
                given[spec.name] = torch.randn(shape, generator=generator).to(getattr(torch, spec.dtype))
        return given


@dataclass(frozen=True)
class Interface:
    """What the graphs of one model take and give: the signatures of its family, for its own `numbers` and `flags`."""

    signatures: Mapping[str, Signature]
    numbers: Mapping[str, int]
    flags: Collection[str] = ()

    def of(self, name: str, passed: Mapping[str, Shape] | None = None) -> tuple[Specs, Specs]:
        """Inputs and outputs of the graph `name`, without caches.

        `passed`: shapes of the tensors whose shape is the business of two graphs alone.
        """
        signature = self.signatures[name]
        return self._specs(signature.inputs, passed or {}), self._specs(signature.outputs, passed or {})

    def _specs(self, stated: Mapping[str, Stated], passed: Mapping[str, Shape]) -> Specs:
        return tuple(
            spec(name, passed[name] if each.shape == PASSED else resolved(each.shape, self.numbers), each.dtype)
            for name, each in stated.items()
            if not each.when or each.when in self.flags
        )


def spec(name: str, shape: Shape, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def patches(patch_size: tuple[int, int, int]) -> dict[str, int]:
    """`Graph.multiples` of latents that are cut into patches (frames, height, width)."""
    return dict(zip(("frames", "height", "width"), patch_size, strict=True))
