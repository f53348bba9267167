"""Wan2.2-A14B as a source of weights: two transformers of the same sizes, one for high and one for low noise.

The first one comes with text encoder, VAE and tokenizer, as any other Wan; of the second one only the transformer is
taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints.contents import boundary_of
from ..checkpoints.experts import Experts, expert_of_lora
from ..checkpoints.hub_cache import called
from ..checkpoints.mapped import Codes
from ..errors import ExportError
from ..parts import SECOND_PARTS, TWO_TRANSFORMERS
from ..presets.wan import A14B, experts_sampler
from .loras import DENOISER, SECOND
from .wan import WanSource
from .wrapped import Wrapped

BOUNDARY = 0.875  # wan/configs/wan_t2v_A14B.py of Wan2.2
_FIRST = dict(zip(SECOND_PARTS, ("backbone", "flow_head"), strict=True))


class TwoTransformers(Wrapped):
    """The first transformer's source, and the transformer of the second."""

    def __init__(self, experts: Experts, model: str | None = None, **sizes: Any) -> None:
        """`model` and `sizes` as for `WanSource`, of both. Raises ExportError as that does, or if they differ."""
        self._high = WanSource([*experts.others, experts.high], model, expert=True, **sizes)
        self._low = WanSource([experts.low], model, expert=True, **sizes)
        super().__init__(self._high)
        for source, path in ((self._high, experts.high), (self._low, experts.low)):
            if "backbone" not in source.default_parts or source.fusion is not None:
                raise ExportError(f"{path} holds no plain transformer, as an expert of Wan2.2-A14B is: copy it again.")
        if self._high.wan != self._low.wan:
            raise ExportError(
                f"{experts.high} is a transformer of other sizes than {experts.low}: they do not belong together."
            )
        if self.model == "wan14b":
            self.model = "wan2.2-a14b"
        self.origin = "; ".join(
            [
                f"checkpoint {' + '.join(dict.fromkeys(map(called, experts.given)))}",
                *self._high.origin.split("; ")[1:],
                *self._low.origin.split("; ")[1:],
            ]
        )
        self.notes = tuple(dict.fromkeys((*self._high.notes, *self._low.notes)))
        self.parts = TWO_TRANSFORMERS
        here = {*self._high.default_parts, *SECOND_PARTS}
        self.default_parts = tuple(part for part in TWO_TRANSFORMERS if part in here)
        found = (boundary_of(path) for path in experts.others if path.is_dir())
        self.boundary = next((boundary for boundary in found if boundary is not None), BOUNDARY)

    @property
    def sampler(self) -> dict[str, Any] | None:  # type: ignore[override]
        scheduled = self._high.sampler
        return None if scheduled is None else experts_sampler(scheduled)

    def completed(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        return {**sampler, "boundary": self.boundary}

    def model_entry(self) -> dict[str, Any]:
        return {**super().model_entry(), "architecture": A14B}

    def check(self, parts: tuple[str, ...]) -> None:
        first, second = _apart(parts)
        if first:
            self._high.check(first)
        if second:
            self._low.check(second)

    def module(self, which: str) -> nn.Module:
        return self._low.module(DENOISER) if which == SECOND else super().module(which)

    def tensor(self, which: str, name: str) -> Tensor:
        return self._low.tensor(DENOISER, name) if which == SECOND else super().tensor(which, name)

    def codes(self, which: str, name: str) -> Codes | None:
        return self._low.codes(DENOISER, name) if which == SECOND else super().codes(which, name)

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        first, second = _apart(parts)
        return self._high.sha256(first) | self._low.sha256(second)

    def lora_note(self, path: Path) -> str | None:
        side = expert_of_lora(path)
        return side and (
            f"{called(path)} is for the {side}-noise transformer by its name, and is not added to the other one. "
            "Rename it if it is for both."
        )


def _apart(parts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts of the first transformer and of all other models, and those of the second as the first's are called."""
    first = tuple(part for part in parts if part not in _FIRST)
    return first, tuple(_FIRST[part] for part in parts if part in _FIRST)
