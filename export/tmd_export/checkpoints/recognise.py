"""What a set of tensors is: a part of a Wan model in a known layout, or a student; complete, or with all that is wrong.

Nothing is taken from a flag or a configuration file: names and shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tmd_engines.errors import quote

from ..errors import ExportError
from .experts import refuse_expert_files, refuse_expert_tensors
from .mapped import Codes
from .names import bare, converted
from .strangers import stranger
from .tensors import Entry, Tensors

LISTED = 6  # names per kind of problem in a message

PARTS = {
    "transformer": "Wan's transformer",
    "text_encoder": "UMT5's encoder",
    "vae": "Wan's VAE",
    "student": "a TMD student",
}
"""What files can hold, and what a message calls it."""

# Names that a part has in its original layout and in that of diffusers (transformers for the text encoder).
_SIGNS = {
    ("transformer", "original"): r"blocks\.\d+\.(self_attn|cross_attn)\.",
    ("transformer", "diffusers"): r"blocks\.\d+\.attn[12]\.",
    ("transformer", "fastvideo"): r"blocks\.\d+\.(attn2|to_[qkv]|to_out|norm_[qk]|ffn\.fc_(in|out))\.",
    ("text_encoder", "original"): r"blocks\.\d+\.(attn\.|pos_embedding\.|ffn\.fc[12]\.)",
    ("text_encoder", "diffusers"): r"encoder\.block\.\d+\.layer\.",
    ("text_encoder", "ggml"): r"enc\.blk\.\d+\.",
    ("vae", "original"): r"(en|de)coder\.(middle|downsamples|upsamples)\.",
    ("vae", "diffusers"): r"(en|de)coder\.(mid_block|down_blocks|up_blocks)\.",
    ("student", "original"): r"(backbone|head)\.blocks\.\d+\.",
}

_FLOATS = ("float32", "float16", "bfloat16", "float64")
TOKENIZER = "spiece_model"  # as ComfyUI's files of text encoders carry it: the bytes of that file as a tensor
_TWICE = {"encoder.embed_tokens.weight": "shared.weight"}  # transformers may store the embedding under both names
_PATCHES = "patch_embedding.weight"  # [D,C,1,2,2], or [D,4·C] where patches are flattened first (rCM)


@dataclass(frozen=True)
class Kind:
    """One of `PARTS` and the layout of its names: "original" or one of `names.TABLES`."""

    part: str
    layout: str


@dataclass(frozen=True)
class Size:
    """Width and number of blocks of a transformer."""

    dim: int
    blocks: int

    def __str__(self) -> str:
        return f"width {self.dim}, {self.blocks} blocks"


class Checkpoint:
    """The tensors of one part under the names of `tmd_ref`."""

    def __init__(self, tensors: Tensors, expert: bool = False) -> None:
        """Raises ExportError if `tensors` are no part of a Wan model, or a relative that the graphs do not compute; or
        one of the two transformers of a Wan2.2-A14B, unless that is expected (`expert`)."""
        self.tensors = tensors
        self.where = _where(tensors.files)
        if not expert:
            refuse_expert_tensors(self.where, tensors.entries)
        self._stored = self._by_bare_name()
        entries = {name: tensors.entries[stored] for name, stored in self._stored.items()}
        if family := stranger(entries):
            raise ExportError(f"{self.where} is {family}.")
        kind = recognise(entries)
        if kind is None:
            raise ExportError(
                f"{self.where} holds no part of a Wan model: its {len(entries)} tensors are called "
                f"{_listed([quote(name) for name in entries])}. A checkpoint holds {', '.join(PARTS.values())}."
            )
        if kind.part == "transformer" and not expert:
            refuse_expert_files(tensors.files)
        self.part, self.layout = kind.part, kind.layout
        self._names: dict[str, str] = {}
        self._shapes: Mapping[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        """Whether `read` knows this name."""
        return name in self._names

    @property
    def stored_as(self) -> str | None:
        """How weights are stored that are not floating point, as a part of a sentence; None if all are."""
        if not self.tensors.formats:
            return None
        formats = _listed([f"{form} ({count})" for form, count in self.tensors.formats.most_common()])
        return f"weights of {PARTS[self.part]} stored as {formats}: dequantised to bfloat16"

    def tokenizer(self) -> bytes | None:
        """The sentencepiece file that a text encoder's file may carry."""
        entry = self._entry(TOKENIZER)
        if entry is None or entry.dtype not in ("uint8", "int8"):
            return None
        return bytes(self.tensors.read(self._stored[TOKENIZER]).numpy().tobytes())

    def size(self) -> Size:
        """Of a transformer, from its tensors; 0 for what they do not tell."""
        blocks = [int(match[1]) for name in self._stored if (match := re.match(r"blocks\.(\d+)\.", name))]
        bias = self._stored.get("patch_embedding.bias") or self._stored.get("blocks.0.modulation")
        shape = self.tensors.entries[bias].shape if bias else ()
        return Size(shape[-1] if shape else 0, 1 + max(blocks, default=-1))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor with the original name `name`, as it is stored; () if there is none."""
        entry = self._entry(self._alias(self._called(name)))
        return entry.shape if entry else ()

    def fit(self, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
        """Makes the tensors readable under the names of `shapes`, whose shapes they must have.

        `model` is what the message calls the wanted model. Raises ExportError that lists what is missing, what is too
        much and what has another shape or is no floating point tensor.
        """
        wanted = {name: self._alias(self._called(name)) for name in shapes}
        missing = [stored for stored in wanted.values() if stored not in self._stored]
        extra = [name for name in self._stored if name not in set(wanted.values()) and not self._tolerated(name)]
        misshaped = []
        for name, stored in wanted.items():
            entry = self._entry(stored)
            if entry is not None and entry.shape not in _accepted(name, tuple(shapes[name])):
                misshaped.append(f"{quote(stored)} is {list(entry.shape)} instead of {list(shapes[name])}")
            elif entry is not None and entry.dtype not in _FLOATS:
                misshaped.append(f"{quote(stored)} is {entry.dtype} instead of {' or '.join(_FLOATS)}")
        problems = [
            f"{len(found)} {what} ({_listed(found)})"
            for what, found in (
                ("missing", [quote(name) for name in missing]),
                ("unexpected", [quote(name) for name in extra]),
                ("of another shape or type", misshaped),
            )
            if found
        ]
        if problems:
            raise ExportError(
                f"{self.where} does not fit {PARTS[self.part]} ({model}). Of its {len(wanted)} tensors: "
                f"{'; '.join(problems)}. Copy it again; if that does not help, it is another model."
            )
        self._names, self._shapes = {name: self._stored[stored] for name, stored in wanted.items()}, shapes

    def read(self, name: str) -> Tensor:
        """The tensor that `fit` knows as `name`: on the CPU, as stored, mapped from its file, or as its
        storage format means it. KeyError for another."""
        return self.tensors.read(self._names[name]).reshape(tuple(self._shapes[name]))

    def codes(self, name: str) -> Codes | None:
        """The same as small numbers and scales, if it is stored so."""
        return self.tensors.codes(self._names[name])

    def _by_bare_name(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for stored in self.tensors.entries:
            name = bare(stored)
            if name in found:
                raise ExportError(
                    f"{self.where} holds {quote(name)} twice, as {quote(found[name])} and as {quote(stored)}: "
                    "save the tensors of one model alone."
                )
            found[name] = stored
        return found

    def _entry(self, name: str) -> Entry | None:
        stored = self._stored.get(name)
        return self.tensors.entries[stored] if stored is not None else None

    def _called(self, name: str) -> str:
        """A name of `tmd_ref` in the layout of this file."""
        return name if self.layout == "original" else converted(self.part, name, self.layout)

    def _alias(self, name: str) -> str:
        other = next((other for other, first in _TWICE.items() if first == name), None)
        return other if other is not None and name not in self._stored and other in self._stored else name

    def _tolerated(self, name: str) -> bool:
        """Bookkeeping that is no weight: states of a library, counters of the training, an embedded tokenizer."""
        entry = self._entry(name)
        return (
            name.endswith("_extra_state")
            or (entry is not None and entry.dtype == "int64")
            or name in _TWICE
            or name == TOKENIZER
        )


def recognise(entries: Mapping[str, Entry]) -> Kind | None:
    """The part and layout whose names `entries` (by bare name) has most of; None if it has none."""
    counts = {Kind(*kind): sum(re.match(sign, name) is not None for name in entries) for kind, sign in _SIGNS.items()}
    best = max(counts, key=lambda kind: counts[kind])
    return best if counts[best] else None


def _accepted(name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if name != _PATCHES:
        return (shape,)
    flat = 1
    for side in shape[1:]:
        flat *= side
    return shape, (shape[0], flat)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _where(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0].parent} ({len(files)} shards)"
