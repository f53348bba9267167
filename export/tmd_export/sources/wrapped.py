"""A source around another one, which changes some of what it gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..checkpoints.mapped import Codes
from .source import Source


class Wrapped(Source):
    """All that `inner` says and gives, unchanged; subclasses change their part of it."""

    def __init__(self, inner: Source) -> None:
        self._inner = inner
        self.model, self.family, self.origin = inner.model, inner.family, inner.origin
        self.tokenizer, self.notes, self.trained = inner.tokenizer, inner.notes, inner.trained
        self.parts, self.default_parts = inner.parts, inner.default_parts

    @property
    def sampler(self) -> dict[str, Any] | None:  # type: ignore[override]  # read when it is needed: it may be refused
        return self._inner.sampler

    @property
    def sampler_note(self) -> str | None:  # type: ignore[override]
        return self._inner.sampler_note

    @property
    def encodes_with(self) -> Source:
        return self._inner.encodes_with

    def model_entry(self) -> dict[str, Any]:
        return self._inner.model_entry()

    def latents_entry(self) -> dict[str, Any]:
        return self._inner.latents_entry()

    def text_entry(self) -> dict[str, Any]:
        return self._inner.text_entry()

    def check(self, parts: tuple[str, ...]) -> None:
        self._inner.check(parts)

    def module(self, which: str) -> nn.Module:
        return self._inner.module(which)

    def tensor(self, which: str, name: str) -> Tensor:
        return self._inner.tensor(which, name)

    def codes(self, which: str, name: str) -> Codes | None:
        return self._inner.codes(which, name)

    def null_embeds(self) -> Tensor | None:
        return self._inner.null_embeds()

    def sha256(self, parts: tuple[str, ...]) -> dict[str, str]:
        return self._inner.sha256(parts)

    def loras(self) -> tuple[dict[str, Any], ...]:
        return self._inner.loras()

    def published_names(self, name: str) -> tuple[str, ...]:
        return self._inner.published_names(name)

    def completed(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        return self._inner.completed(sampler)

    def lora_note(self, path: Path) -> str | None:
        return self._inner.lora_note(path)
