"""Engines that are opened side by side, by threads, before their stages come. For engines that allow it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmd_engines import Engine

WORKERS = 2


class Ahead:
    """Opens engines in the order of `names`. What fails is raised where the engine is asked for."""

    def __init__(self, names: Sequence[str], load: Callable[[str], Engine]) -> None:
        self._waiting, self._load = list(names), load
        self._ready = {name: threading.Event() for name in names}
        self._made: dict[str, Engine | BaseException] = {}
        self._lock = threading.Lock()
        for _ in range(min(WORKERS, len(names))):
            threading.Thread(target=self._work, name="load", daemon=True).start()

    def take(self, name: str) -> Engine | None:
        """The engine, when it is there, for its only taker; None: nobody has begun to open it, or it was taken."""
        with self._lock:
            ready = self._ready.get(name)
            if name in self._waiting:
                self._waiting.remove(name)
                del self._ready[name]
                return None
        if ready is None:
            return None
        ready.wait()  # who is interrupted here may ask again, and `close` finds the engine
        with self._lock:
            self._ready.pop(name, None)
            made = self._made.pop(name, None)
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Closes what nobody took, and waits for what is being opened."""
        for name in list(self._ready):
            with suppress(Exception):
                made = self.take(name)
                if made is not None:
                    made.close()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    return
                name = self._waiting.pop(0)
                ready = self._ready[name]
            try:
                self._made[name] = self._load(name)
            except BaseException as error:
                self._made[name] = error
            ready.set()
