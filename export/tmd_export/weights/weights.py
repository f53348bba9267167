"""The weights of one graph: which tensor of the source each is, and in which type and layout it is written.

A graph is traced with placeholders that take no memory. Its large weights then come from the source one at a time,
under names that tell how each is laid out: "blocks.0.ffn.0.weight.T" is that weight transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..checkpoints.mapped import Codes
from ..errors import ExportError
from ..sources.source import Source

SMALL = 2048  # elements; a weight up to here is traced with its values, so that what depends on weights alone is folded
CHUNK_BYTES = 32 << 20
LAYOUTS = {".T": lambda weight: weight.t(), ".flat": lambda weight: weight.flatten(1)}
"""Suffix of a name -> what was done to the weight."""


class Weights:
    """Weights by their names in a graph's module, from `source`."""

    def __init__(self, source: Source, which: str, names: Mapping[str, str], module: nn.Module) -> None:
        """`names`: name in `module` -> name in the source's model `which`. The types are those of `module`, now."""
        self._source, self._which, self._names = source, which, names
        self.specs = {name: (weight.shape, weight.dtype) for name, weight in module.named_parameters()}

    def __contains__(self, name: str) -> bool:
        """Whether `name` is one of these weights, in whatever layout."""
        return _split(name)[0] in self.specs

    def bytes(self, as_float32: bool = False) -> int:
        """What all of them take in a file."""
        return sum(shape.numel() * (4 if as_float32 else dtype.itemsize) for shape, dtype in self.specs.values())

    def form(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Shape, in its layout, and type of the weight `name`."""
        weight, suffixes = _split(name)
        shape, dtype = self.specs[weight]
        return _lay_out(torch.empty(shape, device="meta"), suffixes).shape, dtype

    def laid_out(self, name: str) -> Tensor:
        """The weight `name` in its layout, still in the source's type and, if so, still on the disk."""
        weight, suffixes = _split(name)
        tensor, (shape, _) = self._source.tensor(self._which, self._names[weight]), self.specs[weight]
        if tensor.shape != shape:
            raise ExportError(
                f"the source gives {self._names[weight]} as {list(tensor.shape)} where {list(shape)} belongs: its "
                "weights are not of this model."
            )
        return _lay_out(tensor, suffixes)

    def codes(self, name: str) -> Codes | None:
        """The matrix that the weight `name` is the transpose of, as the source keeps it in small numbers."""
        weight, suffixes = _split(name)
        return self._source.codes(self._which, self._names[weight]) if suffixes == [".T"] else None

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The weight `name` as it is written: contiguous pieces along its first axis, in the type of the graph.

        Raises ExportError if a value is beyond that type.
        """
        tensor, (_, dtype) = self.laid_out(name), self.specs[_split(name)[0]]
        rows = max(1, CHUNK_BYTES // max(1, tensor[:1].numel() * dtype.itemsize))
        for start in range(0, tensor.shape[0], rows):
            piece = tensor[start : start + rows]
            yield _converted(piece, dtype, name).contiguous()

    def fill(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Gives every parameter of `module` that is in use its values, in `dtype` (None: that of the graph)."""
        for owner, key, name in _places(module):
            if name in self.specs:
                values = _converted(self.laid_out(name), dtype or self.specs[name][1], name)
                setattr(owner, key, nn.Parameter(values, requires_grad=False))

    def put_placeholders(self, module: nn.Module) -> None:
        """Gives every parameter of `module` a value without memory: one zero, repeated. Small ones get their own."""
        for owner, key, name in _places(module):
            shape, dtype = self.specs[name]
            if shape.numel() <= SMALL:
                value = _converted(self.laid_out(name), dtype, name).clone()
            else:
                value = torch.zeros((), dtype=dtype).expand(shape)
            setattr(owner, key, nn.Parameter(value, requires_grad=False))

    def drop_unused(self, used: set[str]) -> None:
        """Forgets the weights that the graph does without: the encoder beside a decoder."""
        self.specs = {name: spec for name, spec in self.specs.items() if name in used}


def _split(name: str) -> tuple[str, list[str]]:
    """The weight that `name` is made of and what was done to it: "a.flat.T" -> "a", [".flat", ".T"]."""
    suffixes: list[str] = []
    while True:
        suffix = next((suffix for suffix in LAYOUTS if name.endswith(suffix)), None)
        if suffix is None:
            return name, suffixes[::-1]
        name = name.removesuffix(suffix)
        suffixes.append(suffix)


def _lay_out(tensor: Tensor, suffixes: list[str]) -> Tensor:
    for suffix in suffixes:
        tensor = LAYOUTS[suffix](tensor)
    return tensor


def _places(module: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """(owner, attribute, name) of every parameter."""
    return [
        (owner, key, f"{path}.{key}" if path else key)
        for path, owner in module.named_modules()
        for key, _ in owner.named_parameters(recurse=False)
    ]


def _converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    converted = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(converted).all() and torch.isfinite(tensor).all():
        raise ExportError(
            f"the weight {name} has values up to {tensor.abs().max():.3g}, and float16 ends at 65504: "
            "choose --precision bf16 or fp32."
        )
    return converted
