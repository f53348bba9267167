"""What a storage format is, and what several of them share: a layer's stored tensors, and scales that are checked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor

from tmd_engines.errors import quote

from ...errors import ExportError
from ..mapped import Codes, Entry, Packed, Tensors
from .rows import by_rows

FP8 = ("float8_e4m3fn", "float8_e5m2")


class StorageFormat(ABC):
    """One way to store weights in fewer bits."""

    @abstractmethod
    def unpack(self, tensors: Tensors) -> None:
        """Replaces the stored tensors of this format by the weights that they make up; does nothing if there are none.

        Only names, types and shapes are looked at, and what the format says of itself. Raises ExportError for a
        variant that is not read, and for tensors that do not fit each other.
        """


class Layer:
    """Stored tensors that belong together: `weight` and others of the same name with another ending."""

    def __init__(self, tensors: Tensors, weight: str, form: str) -> None:
        """`form` names the format in messages. Raises ExportError if there is no tensor `weight`."""
        self.tensors, self.weight, self.form = tensors, weight, form
        self.stem = weight.removesuffix("weight")
        if weight not in tensors.entries:
            raise self.error(f"{quote(weight)} is missing")

    def error(self, what: str) -> ExportError:
        """`what` does not fit the format."""
        return ExportError(
            f"{self.tensors.files[0]} is stored as {self.form}, and {what}: it is damaged, or a variant that is not "
            "known here. Copy it again, or take the same model in bfloat16."
        )

    def has(self, name: str) -> bool:
        return name in self.tensors.entries

    def entry(self, name: str, dtypes: tuple[str, ...], counts: tuple[int, ...] | None = None) -> Entry:
        """The stored tensor `name`, of one of `dtypes` and with one of `counts` values. Raises ExportError if not."""
        entry = self.tensors.entries.get(name)
        if entry is None:
            raise self.error(f"{quote(name)} is missing")
        if entry.dtype not in dtypes:
            raise self.error(f"{quote(name)} is {entry.dtype} instead of {' or '.join(dtypes)}")
        if counts is not None and prod(entry.shape) not in counts:
            raise self.error(f"{quote(name)} is {list(entry.shape)}, which does not fit {quote(self.weight)}")
        return entry

    def matrix(self, dtypes: tuple[str, ...]) -> Entry:
        """The stored weight, which must have rows and columns."""
        entry = self.entry(self.weight, dtypes)
        if len(entry.shape) != 2:
            raise self.error(f"{quote(self.weight)} is {list(entry.shape)} and no matrix")
        return entry

    def numbers(self, name: str) -> Tensor:
        """A stored tensor of scales in float32. Raises ExportError if one of them is not a number."""
        values = self.tensors.read_stored(name).float()
        if not torch.isfinite(values).all():
            raise self.error(f"{quote(name)} has values that are no numbers")
        return values

    def extras(self, *endings: str) -> tuple[str, ...]:
        """The names of those stored tensors of the layer that are there."""
        return tuple(self.stem + ending for ending in endings if self.has(self.stem + ending))


SCALES = ("float32", "bfloat16", "float16")


def scaled(layer: Layer, scale: str, dtypes: tuple[str, ...], parts: tuple[str, ...]) -> Packed:
    """A weight of small numbers times one scale, or one per row, as most formats have it: W = q · scale."""
    entry = layer.entry(layer.weight, dtypes)
    rows = entry.shape[0] if entry.shape else 1
    layer.entry(scale, SCALES, (1, rows))

    def read() -> Tensor:
        stored, factor = layer.tensors.read_stored(layer.weight), layer.numbers(scale)
        if factor.numel() == 1:
            factor = factor.expand(rows)
        factor = factor.reshape(rows, *[1] * (len(entry.shape) - 1))
        values = stored.reshape(rows, *entry.shape[1:])
        return by_rows(values.shape, lambda some: values[some].float() * factor[some]).reshape(entry.shape)

    def codes() -> Codes:
        return Codes(layer.tensors.read_stored(layer.weight), layer.numbers(scale).reshape(-1).expand(rows))

    return Packed(Entry(entry.shape, "bfloat16"), layer.form, (layer.weight, scale, *parts), read, codes)
