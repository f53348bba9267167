"""Which graphs a pipeline has loaded at the same time."""

from __future__ import annotations

from typing import Any

import pytest

import tmd_engines
from tmd_engines import Bundle


class Watch:
    """Counts which graphs are loaded at the same time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: set[str] = set()
        self.together: list[set[str]] = []
        original = tmd_engines.load

        def load(bundle: Bundle, graph: str, **options: Any) -> Any:
            engine = original(bundle, graph, **options)
            close = engine.close

            def watched() -> None:
                self.loaded.discard(graph)
                close()

            engine.close = watched  # type: ignore[method-assign]
            self.loaded.add(graph)
            self.together.append(set(self.loaded))
            return engine

        monkeypatch.setattr(tmd_engines, "load", load)
