"""Memory that plans need while they run: one piece for the process, as large as the largest plan in use asks for.

Graphs of a run follow one another on one stream, so that they can share it. Of Wan2.1-1.3B at 832x480x81 four graphs
would take 5.5 GB, and share 2.0 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from ..errors import EngineError


class Block(Protocol):
    """Memory on the device, freed when nobody refers to it."""

    @property
    def address(self) -> int: ...

    nbytes: int


class Scratch:
    """The shared piece. `moves` counts how often it was replaced: what was recorded with it before is void then."""

    def __init__(self, allocate: Callable[[int], Block]) -> None:
        self._allocate = allocate
        self._block: Block | None = None
        self.moves = 0

    @property
    def size(self) -> int:
        return self._block.nbytes if self._block is not None else 0

    def reserve(self, size: int) -> None:
        """Makes it at least this large. Nothing may be running. Raises EngineError where the memory is not there; then
        it is as large as before, for those that run in it."""
        before = self.size
        if self._block is None or size > before:
            self._block = None  # two would not fit side by side
            self.moves += 1
            try:
                self._block = self._allocate(max(1, size))
            except EngineError:
                with suppress(EngineError):
                    self._block = self._allocate(before) if before else None
                raise

    @property
    def address(self) -> int:
        """Where it is. Only after `reserve`."""
        if self._block is None:
            raise RuntimeError("no scratch memory was reserved")
        return self._block.address
