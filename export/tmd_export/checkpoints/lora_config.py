"""The scale that PEFT and diffusers state beside a LoRA's matrices, not among them.

PEFT writes `adapter_config.json` into the folder of `adapter_model.safetensors`; diffusers the same fields into the
metadata of the file. Without either, and without an `alpha` in the file, the product counts as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tmd_engines.errors import quote

from ..errors import ExportError
from .documents import parse_document, read_document

CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # diffusers' key
_PREFIX = "transformer."  # of its fields, where it saves a whole pipeline
_MAX_BYTES = 1 << 20
MAX_ALPHA = 1e9
_LITERAL = re.compile(r"\^?[\w.]+\$?")  # a pattern that is a name; PEFT allows any


@dataclass(frozen=True)
class LoraConfig:
    """`alpha` of all layers, `alphas` of some by the end of their name; `by_root`: alpha over the root of the rank."""

    alpha: float | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def scale(self, layer: str, rank: int) -> float | None:
        """Factor of the product of a layer whose file calls it `layer`; None if nothing is stated."""
        own = (alpha for end, alpha in self.alphas.items() if layer == end or layer.endswith(f".{end}"))
        alpha = next(own, self.alpha)
        return None if alpha is None else alpha / (math.sqrt(rank) if self.by_root else rank)


def read_lora_config(file: Path, metadata: Mapping[str, str]) -> tuple[LoraConfig, Path | None]:
    """What is stated for the LoRA in `file`, and the file beside it that states it, if one does. Raises ExportError."""
    beside = file.parent / CONFIG
    if file.stem == "adapter_model" and beside.is_file():
        return _config(beside, read_document(beside, _MAX_BYTES)), beside
    if _METADATA in metadata:
        fields = parse_document(f"the configuration of {file}", metadata[_METADATA].encode())
        return _config(file, {name.removeprefix(_PREFIX): value for name, value in fields.items()}), None
    return LoraConfig(), None


def _config(path: Path, fields: Mapping[str, Any]) -> LoraConfig:
    kind = fields.get("peft_type", "LORA")
    if kind != "LORA" or fields.get("use_dora"):
        raise ExportError(
            f"{path} is {'a DoRA' if kind == 'LORA' else f'of the kind {quote(str(kind))}'}, whose differences are no "
            "product of two matrices: only a plain LoRA can be merged here. Merge it with the program that made it."
        )
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_LITERAL.fullmatch, patterns)):
        raise ExportError(
            f"the configuration of {path} states alphas for patterns of layers ({quote(str(patterns), 200)}), and only "
            "names of layers are read here: take the LoRA with an alpha in every layer."
        )
    alphas = {end.strip("^$"): _alpha(path, alpha) for end, alpha in patterns.items()}
    return LoraConfig(_alpha(path, fields.get("lora_alpha")), alphas, fields.get("use_rslora") is True)


def _alpha(path: Path, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < MAX_ALPHA:
        raise ExportError(
            f"the configuration of {path} has {quote(str(value)[:64])} as an alpha, where a number belongs: "
            "copy it again."
        )
    return float(value)
