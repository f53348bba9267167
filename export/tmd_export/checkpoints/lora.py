"""One file with a LoRA: which weights it changes, whether it fits, and the sums themselves.

W' = W + strength·(alpha/rank)·up·down + strength·diff and b' = b + strength·diff_b, in float32 and not rounded here.
The file is untrusted: only headers are read before a weight is asked for, shapes are checked against the model's, and
a value that is not finite is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from tmd_engines.bundle.files import sha256_hex
from tmd_engines.errors import quote

from ..errors import ExportError
from .folders import WEIGHTS
from .hub_cache import called
from .lora_config import MAX_ALPHA, read_lora_config
from .lora_names import ALPHA, DIFF, DIFF_BIAS, DOWN, UP, UP_BIAS, Layers, other_kind, role
from .recognise import LISTED
from .tensors import Entry, Tensors, open_tensors

FILES = tuple(f"{stem}{end}" for stem in ("adapter_model", "pytorch_lora_weights") for end in (".safetensors", ".bin"))
"""What PEFT and diffusers call the file in a folder of theirs."""

_FLOATS = ("float64", "float32", "float16", "bfloat16")
_NUMBERS = (*_FLOATS, "int64", "int32")


@dataclass(frozen=True)
class _Term:
    """What is added to one weight: factor·up·down, or factor·up where there is no down. Names as stored."""

    factor: float
    up: str
    down: str | None = None


class Lora:
    """A LoRA in a file. `fit` says what it changes; after it, `add` does it."""

    def __init__(self, path: str | Path, strength: float = 1.0) -> None:
        """`path`: a file, or a folder of PEFT or diffusers. Raises ExportError if it is no LoRA of this kind."""
        self.file, self.strength = _locate(Path(path)), strength
        self.name = f"{called(self.file.parent)}/{self.file.name}" if Path(path).is_dir() else called(self.file)
        if not self.name.isprintable():
            raise ExportError(f"the name {quote(self.name)} of a LoRA holds what cannot be printed: rename the file.")
        self.tensors: Tensors = open_tensors((self.file,))
        self._config, self.config_file = read_lora_config(self.file, self.tensors.metadata)
        self.layers = self._sorted()  # layer as the file calls it -> matrix -> name of the tensor
        self._terms: dict[str, list[_Term]] = {}

    @cached_property
    def sha256(self) -> str:
        with open(self.file, "rb", buffering=0) as file:
            return sha256_hex(file)

    @property
    def lacks_alpha(self) -> bool:
        """Whether it is in the layout of kohya's trainers, where an alpha belongs to every layer, and has none."""
        named = any("lora_down" in name for name in self.tensors.entries)
        return named and not any(ALPHA in parts for parts in self.layers.values()) and self._config.alpha is None

    def entry(self) -> dict[str, object]:
        """Of the manifest's `provenance.loras`."""
        return {"file": self.name, "sha256": self.sha256, "strength": self.strength}

    def fit(self, model: Layers) -> list[str]:
        """Decides what is added to which weight of `model`. Returns what does not fit, one text for each layer."""
        problems, taken = [], dict[str, str]()
        for name, parts in self.layers.items():
            layer = model.find(name)
            if layer is None:
                problems.append(f"{quote(name)} hits nothing")
            elif layer in taken:
                problems.append(f"{quote(name)} is the same layer as {quote(taken[layer])}")
            else:
                taken[layer] = name
                problems += self._fit_layer(name, parts, layer, model)
        return problems

    def touches(self, name: str) -> bool:
        """Whether `add` changes the weight `name`; at strength 0, none."""
        return self.strength != 0 and name in self._terms

    def add(self, name: str, weight: Tensor) -> None:
        """Adds to `weight`, float32 and contiguous, what the LoRA has for `name`. Raises ExportError if the sum is not
        finite."""
        for term in self._terms[name]:
            factor = self.strength * term.factor
            up = self.tensors.read(term.up).to(torch.float32)
            if term.down is None:
                weight.add_(up.reshape(weight.shape), alpha=factor)
                continue
            down = self.tensors.read(term.down).to(torch.float32)
            weight.flatten(1).addmm_(up.flatten(1), down.flatten(1), alpha=factor)
        if not all(math.isfinite(end) for end in torch.aminmax(weight)):  # torch.isfinite would copy the weight
            raise ExportError(
                f"{quote(name)} has values that are not finite after {self.file} was added at strength "
                f"{self.strength:g}: the file is damaged. Copy it again."
            )

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Layers as the file calls them, and the shapes of the differences to their weights; () where only a bias is
        changed."""
        for name, parts in self.layers.items():
            found = {part: self.tensors.entries[stored].shape for part, stored in parts.items()}
            if DIFF in found:
                yield name, found[DIFF]
            elif UP in found and DOWN in found:
                yield name, (*found[UP][:1], *found[DOWN][1:])
            else:
                yield name, ()

    def _sorted(self) -> dict[str, dict[str, str]]:
        names = list(self.tensors.entries)
        if kind := other_kind(names):
            raise ExportError(
                f"{self.file} is {kind[0]} ({quote(kind[1])} is in it): only a plain LoRA can be merged here. Merge it "
                "with the program that made it, and give the result as a --checkpoint."
            )
        layers: dict[str, dict[str, str]] = {}
        foreign = []
        for stored in names:
            found = role(stored)
            if found is None:
                foreign.append(stored)
            elif found[1] in (parts := layers.setdefault(found[0], {})):
                raise ExportError(
                    f"{self.file} holds {quote(parts[found[1]])} and {quote(stored)}, two of the same: save one LoRA "
                    "alone."
                )
            else:
                parts[found[1]] = stored
        if not layers:
            raise ExportError(
                f"{self.file} holds no LoRA: its {len(names)} tensors are called {listed(map(quote, names))}. A LoRA "
                "has pairs such as lora_up and lora_down; a whole model is a --checkpoint."
            )
        if foreign:
            raise ExportError(
                f"{self.file} holds {len(foreign)} tensors beside its LoRA that would be lost: "
                f"{listed(map(quote, foreign))}. Merge it with the program that made it."
            )
        return layers

    def _fit_layer(self, name: str, parts: dict[str, str], layer: str, model: Layers) -> Iterator[str]:
        entries = {part: self.tensors.entries[stored] for part, stored in parts.items()}
        for part, entry in entries.items():
            if entry.dtype not in (_NUMBERS if part == ALPHA else _FLOATS):
                yield f"{quote(parts[part])} is {entry.dtype} instead of {' or '.join(_FLOATS)}"
                return
        if (UP in parts) != (DOWN in parts) or not set(parts) - {ALPHA}:
            yield f"{quote(name)} has {' and '.join(sorted(parts))} alone"
            return
        scale = 1.0
        if UP in parts:
            scale = self._scale(name, parts, entries[DOWN])
            weight = model.weight(layer)
            problem = (
                _misfit(entries[UP].shape, entries[DOWN].shape, model.shapes[weight]) if weight else "has no weight"
            )
            if problem is not None:
                yield f"{quote(name)} {problem}"
            elif weight is not None:
                self._terms.setdefault(weight, []).append(_Term(scale, parts[UP], parts[DOWN]))
        for part, target, factor in (
            (DIFF, model.weight(layer), 1.0),
            (DIFF_BIAS, model.bias(layer), 1.0),
            (UP_BIAS, model.bias(layer), scale),
        ):
            if part not in parts:
                continue
            if target is None:
                yield f"{quote(parts[part])} hits nothing"
            elif not _same(entries[part].shape, model.shapes[target]):
                yield f"{quote(parts[part])} is {list(entries[part].shape)} instead of {list(model.shapes[target])}"
            else:
                self._terms.setdefault(target, []).append(_Term(factor, parts[part]))

    def _scale(self, name: str, parts: dict[str, str], down: Entry) -> float:
        """alpha/rank of a pair, 1 if there is no alpha."""
        rank = max(1, down.shape[0] if down.shape else 1)
        if ALPHA not in parts:
            stated = self._config.scale(name, rank)
            return 1.0 if stated is None else stated
        if math.prod(self.tensors.entries[parts[ALPHA]].shape) != 1:
            raise ExportError(f"{quote(parts[ALPHA])} of {self.file} is not one number: copy it again.")
        alpha = float(self.tensors.read(parts[ALPHA]).reshape(()))
        if not abs(alpha) < MAX_ALPHA:
            raise ExportError(f"{quote(parts[ALPHA])} of {self.file} is {alpha}: copy it again.")
        return alpha / rank


def listed(names: Iterator[str] | list[str]) -> str:
    """The first few of them."""
    names = list(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _misfit(up: tuple[int, ...], down: tuple[int, ...], weight: tuple[int, ...]) -> str | None:
    """What is wrong with the matrices for a weight of this shape; None if nothing is.

    Of a convolution, up is [out, rank, 1, ...] and down has the kernel: [rank, in, height, width]. Both may be flat.
    """
    if len(weight) < 2:
        return f"is a product, and the weight has the shape {list(weight)}"
    if len(up) < 2 or len(down) < 2 or up[1] != down[0] or math.prod(up[2:]) != 1 or 0 in (*up, *down):
        return f"has up {list(up)} and down {list(down)}, which cannot be multiplied"
    if up[1] > max(weight[0], math.prod(weight[1:])):
        return f"has rank {up[1]}, more than its weight of {list(weight)} has rows or columns"
    inputs = {weight[1:], (math.prod(weight[1:]),)}
    if up[0] != weight[0] or not (down[1:] in inputs or (len(weight) == 2 and _same(down[1:], weight[1:]))):
        return f"is {[up[0], *down[1:]]} instead of {list(weight)}"
    return None


def _same(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor has the wanted shape, or that with trailing ones, or the same with all but the first flat."""
    flat = (*wanted[:1], math.prod(wanted[1:]))
    bare = shape
    while len(bare) > len(wanted) and bare[-1] == 1:
        bare = bare[:-1]
    return bare == wanted or (len(wanted) > 2 and shape == flat)


def _locate(path: Path) -> Path:
    if path.is_dir():
        found = next((path / name for name in FILES if (path / name).is_file()), None)
        if found is None:
            raise ExportError(f"{path} is a folder without {' or '.join(FILES)}: give the file of the LoRA itself.")
        return found
    if not path.is_file():
        raise ExportError(
            f"there is no file {path}: --lora takes the file of a LoRA, with a strength behind it if it is not 1 "
            "(FILE=0.5). Check the path."
        )
    if path.suffix not in WEIGHTS:
        raise ExportError(f"{path} is no file of weights: those end in {', '.join(WEIGHTS)}.")
    return path
