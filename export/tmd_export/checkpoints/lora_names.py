"""How LoRA files call what they change: the layer, and which of its matrices a tensor is.

A LoRA has for a layer two thin matrices, `up` [out, rank] and `down` [rank, in], whose product is added to the weight;
or the whole difference of a weight (`diff`) or of a bias (`diff_b`). Suffixes as LightX2V's loader, ComfyUI, musubi
and kohya, diffusers and PEFT write them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from .names import INSIDE

UP, DOWN, UP_BIAS, ALPHA, DIFF, DIFF_BIAS = "up", "down", "bias of up", "alpha", "diff", "diff_b"

_PAIR = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<a>up|down|A|B)|_lora\.(?P<b>up|down)|\.lora\.(?P<c>up|down)|\.lora_linear_layer\.(?P<d>up|down))"
    r"(?:\.\w+?)??(?P<leaf>\.bias|\.weight)?"  # PEFT puts the adapter's name between: ".lora_A.default.weight"
)
_WHOLE = {".alpha": ALPHA, ".diff": DIFF, ".diff_b": DIFF_BIAS}
_SIDES = {"A": DOWN, "B": UP, "up": UP, "down": DOWN}

# What trainers and other programs put in front of a layer's name, the longer ones first.
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "net.", "model.",
    "module.", "lora_unet_", "lora_transformer_", "lycoris_", "_",
)  # fmt: skip

# Sign of a tensor's name -> what such a file is. Their differences are no product of two matrices.
_OTHERS = (
    (r"\.(dora_scale|lora_magnitude_vector)", "a DoRA, which scales every column anew"),
    (r"\.hada_w[12]", "a LoHa, a product of two low-rank products element by element"),
    (r"\.lokr_w[12]", "a LoKr, a Kronecker product"),
    (r"\.(oft|boft)_\w", "an OFT, which turns weights"),
    (r"\.lora_mid\b", "a LoCon with a third matrix between its two"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding table"),
    (r"\.(a1|a2|b1|b2)\.weight$", "a GLoRA"),
    (r"\.(ia3_l|on_input)\b", "an (IA)3, which scales activations"),
)


def role(name: str) -> tuple[str, str] | None:
    """The layer that the tensor `name` is of, as the file calls it, and which matrix of it; None if it is no LoRA's."""
    for suffix, kind in _WHOLE.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), kind
    match = _PAIR.fullmatch(name)
    if match is None:
        return None
    side = _SIDES[next(filter(None, match.group("a", "b", "c", "d")))]
    if match["leaf"] != ".bias":
        return match["layer"], side
    return (match["layer"], UP_BIAS) if side == UP else None


def other_kind(names: Sequence[str]) -> tuple[str, str] | None:
    """What a file is that is no plain LoRA, and the name that gives it away; None if none does."""
    for sign, kind in _OTHERS:
        if found := next((name for name in names if re.search(sign, name)), None):
            return kind, found
    return None


class Layers:
    """The layers of a model by all names that a LoRA file can have for them.

    `shapes`: weight -> its shape, by the names of `tmd_ref`.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], aliases: Mapping[str, Sequence[str]]) -> None:
        """`aliases`: weight -> its names in other layouts, which end as it does."""
        self.shapes = shapes
        self._known: dict[str, str] = {}
        for name in shapes:
            for alias in (name, *aliases.get(name, ())):
                layer = _layer(alias)
                for spelling in (layer, layer.replace(".", "_")):
                    self._known.setdefault(spelling, _layer(name))

    def find(self, name: str) -> str | None:
        """The layer that a file calls `name`, by its name in `tmd_ref`; None if the model has none of that name."""
        return next((self._known[spelling] for spelling in _spellings(name) if spelling in self._known), None)

    def weight(self, layer: str) -> str | None:
        """The name of a layer's weight: of some, as the modulation, it is the layer's own."""
        return next((name for name in (f"{layer}.weight", layer) if name in self.shapes), None)

    def bias(self, layer: str) -> str | None:
        return f"{layer}.bias" if f"{layer}.bias" in self.shapes else None


def _layer(name: str) -> str:
    return re.sub(r"\.(weight|bias)$", "", name)


def _spellings(name: str) -> Iterator[str]:
    """`name`, then with one prefix less each time."""
    for inside in INSIDE:
        name = name.replace(inside, "")
    while True:
        yield name
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            return
        name = name.removeprefix(prefix)
