"""LoRAs merged into the denoiser of another source while its weights pass through (`--lora FILE[=STRENGTH]`).

One weight at a time: it is brought to float32, every LoRA that has something for it is added, and the export rounds
the sum once, to the type of the graph. A weight that no LoRA touches passes as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tmd_engines.bundle.files import sha256_hex
from tmd_engines.bundle.sections import MAX_LORAS
from tmd_engines.errors import quote

from ..checkpoints.experts import expert_of_lora
from ..checkpoints.hub_cache import called
from ..checkpoints.lora import Lora, listed
from ..checkpoints.lora_names import Layers
from ..checkpoints.mapped import Codes
from ..checkpoints.recognise import Size
from ..checkpoints.strangers import stranger
from ..checkpoints.tensors import Entry
from ..errors import ExportError
from ..loras import LoraFile, checked_strength
from ..parts import MODEL_OF, SECOND_PARTS
from .source import Source
from .wrapped import Wrapped

DENOISER, SECOND = (MODEL_OF[part] for part in ("backbone", "backbone_2"))


def with_loras(source: Source, loras: Sequence[LoraFile]) -> Source:
    """`source` with LoRAs merged in: of a model of two transformers into the one that a file's name says, "high" or
    "low" noise, or into both. Raises ExportError as `WithLoras`."""
    if not set(SECOND_PARTS) <= set(source.parts):
        return WithLoras(source, loras)
    for which, side in ((DENOISER, "high"), (SECOND, "low")):
        own = [lora for lora in loras if expert_of_lora(lora.path) in (None, side)]
        if own:
            source = WithLoras(source, own, which)
    return source


class WithLoras(Wrapped):
    """The models of another source, with LoRAs added to the weights of its denoiser."""

    def __init__(
        self, source: Source, files: Sequence[LoraFile | tuple[str | Path, float]], which: str = DENOISER
    ) -> None:
        """Reads the headers of all files. `which` of the source's models they are for. Raises ExportError for one that
        is no LoRA, or of which not every tensor hits one of this model."""
        super().__init__(source)
        self._which = which
        if len(files) > MAX_LORAS:
            raise ExportError(f"{len(files)} LoRAs were given, and a manifest holds {MAX_LORAS}: merge some of them.")
        self._published: dict[str, str] = {}  # name in the module -> name of the same weight in a LoRA's terms
        layers = self._layers()
        self._loras = [self._opened(LoraFile(Path(path), strength), layers) for path, strength in files]
        self.origin = f"{source.origin}; {len(files)} LoRA{'s' if len(files) > 1 else ''} merged in"
        notes = (self._notes_on(lora, Path(path)) for lora, (path, _) in zip(self._loras, files, strict=True))
        self.notes = (*source.notes, *(note for each in notes for note in each))

    def loras(self) -> tuple[dict[str, Any], ...]:
        before = super().loras()
        return (*before, *(entry for lora in self._loras if (entry := lora.entry()) not in before))

    def check(self, parts: tuple[str, ...]) -> None:
        if not any(MODEL_OF[part] in (DENOISER, self._which) for part in parts):
            raise ExportError(
                f"--lora changes {' and '.join(self._denoising())}, and none of them is among the parts: leave --lora "
                "out, or add one."
            )
        super().check(parts)

    def tensor(self, which: str, name: str) -> Tensor:
        weight = self._inner.tensor(which, name)
        published, changing = self._published.get(name), self._changing(which, name)
        if published is None or not changing:
            return weight
        merged = weight.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for lora in changing:
            lora.add(published, merged)
        return merged

    def codes(self, which: str, name: str) -> Codes | None:
        return None if self._changing(which, name) else super().codes(which, name)

    def _changing(self, which: str, name: str) -> list[Lora]:
        """The LoRAs that add something to a weight."""
        published = self._published.get(name) if which == self._which else None
        return [lora for lora in self._loras if published is not None and lora.touches(published)]

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        found = super().sha256(parts)
        for lora in self._loras:
            if lora.config_file is not None:  # which has the scale
                with open(lora.config_file, "rb", buffering=0) as file:
                    found[f"{called(lora.config_file.parent)}/{lora.config_file.name}"] = sha256_hex(file)
        return found

    def _layers(self) -> Layers:
        shapes, aliases = dict[str, tuple[int, ...]](), dict[str, tuple[str, ...]]()
        for name, weight in self._inner.module(self._which).named_parameters(remove_duplicate=False):
            published, *others = self._inner.published_names(name)
            self._published[name], shapes[published] = published, tuple(weight.shape)
            aliases[published] = (*aliases.get(published, ()), *others)
        return Layers(shapes, aliases)

    def _denoising(self) -> list[str]:
        return [part for part in self.parts if MODEL_OF[part] == self._which]

    def _opened(self, file: LoraFile, layers: Layers) -> Lora:
        try:
            lora = Lora(file.path, checked_strength(file.strength, file.path))
        except ValueError as error:
            raise ExportError(str(error)) from None
        if problems := lora.fit(layers):
            raise ExportError(self._refusal(lora, layers, problems))
        return lora

    def _refusal(self, lora: Lora, layers: Layers, problems: list[str]) -> str:
        hits = sum(layers.find(name) is not None for name in lora.layers)
        if not hits:
            expected = max(layers.shapes, key=len).removesuffix(".weight")
            return (
                f"{lora.file} hits none of the tensors of {self.model}: its {len(lora.layers)} layers are called "
                f"{listed(map(quote, lora.layers))}, and the model's are called {quote(expected)}. It is for another "
                "model, or for a text encoder, which no LoRA can be merged into here."
            )
        return (
            f"{lora.file} does not fit {self.model}. Of its {len(lora.layers)} layers: {listed(problems)}. "
            f"{self._why(lora, layers)}Nothing was merged: take the LoRA that was made for this model."
        )

    def _why(self, lora: Lora, layers: Layers) -> str:
        """Both sizes if they differ, and the family of the LoRA if it is one that is known by name."""
        entries = {f"{name}.weight": Entry(shape, "float32") for name, shape in _bare(lora, layers)}
        if family := stranger(entries):
            return f"It is for {family.partition(': ')[0]}. "
        own = self.model_entry()
        model, found = Size(own["dim"], own["num_layers"]), _size(lora, layers, own["dim"])
        if found.dim in (0, model.dim) and found.blocks <= model.blocks:
            return ""
        width = f"of width {found.dim} " if found.dim else ""
        return f"It is for a model {width}with at least {found.blocks} blocks, and {self.model} has {model}. "

    def _notes_on(self, lora: Lora, path: Path) -> list[str]:
        notes = []
        if lora.lacks_alpha:
            notes.append(
                f"{lora.name} states no alpha, so the products of its matrices count in full. If its authors name an "
                "alpha, give alpha/rank as the strength (FILE=0.125 for alpha 8 and rank 64)."
            )
        if note := self._inner.lora_note(path):
            notes.append(note)
        return notes


def _bare(lora: Lora, layers: Layers) -> list[tuple[str, tuple[int, ...]]]:
    """The LoRA's layers and the shapes of their differences, where they do not fit, under the model's names if any."""
    found = []
    for name, shape in lora.shapes():
        layer = layers.find(name)
        weight = layers.weight(layer) if layer is not None else None
        if weight is None or shape not in ((), layers.shapes[weight]):
            found.append((layer or name, shape))
    return found


def _size(lora: Lora, layers: Layers, dim: int) -> Size:
    """Width of the model that a LoRA was made for, 0 if it does not tell, and the blocks that it must have."""
    widths = []
    for name, shape in lora.shapes():
        layer = layers.find(name)
        weight = layers.weight(layer) if layer is not None else None
        if weight is not None and layers.shapes[weight][0] == dim and shape:
            widths.append(shape[0])
    blocks = [int(match[1]) for name in lora.layers if (match := re.search(r"blocks[._](\d{1,4})[._]", name))]
    return Size(max(set(widths), key=widths.count) if widths else 0, 1 + max(blocks, default=-1))
