"""Embeddings of recent prompts, so that a prompt which comes again does not load or run the text encoder."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Embedded:
    """The embeddings of a prompt, and of its negative prompt where there is guidance; `warnings` came with them."""

    positive: NDArray[Any]
    negative: NDArray[Any] | None
    warnings: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.positive.nbytes + (0 if self.negative is None else self.negative.nbytes)


class EmbedsCache:
    """The latest embeddings, in at most so many bytes. For one thread."""

    def __init__(self, most_bytes: int = 64 << 20) -> None:
        self._most, self._kept = most_bytes, OrderedDict[object, Embedded]()
        self.hits = self.misses = 0

    def get(self, key: object) -> Embedded | None:
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
        else:
            self.hits += 1
            self._kept.move_to_end(key)
        return found

    def put(self, key: object, embedded: Embedded) -> None:
        self._kept[key] = embedded
        while sum(kept.bytes for kept in self._kept.values()) > self._most:
            self._kept.popitem(last=False)
