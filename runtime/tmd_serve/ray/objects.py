"""Arrays in Ray's object store."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import ray

_KEPT_SECONDS = 60.0


class Objects:
    """Puts arrays into the object store, and holds on to them for a minute.

    A reference inside a streamed answer counts only when the reader's process has made itself known as a borrower. If
    the replica let go at once, the array could be gone before that (seen with Ray 2.60).
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[float, Any]] = deque()
        self._lock = threading.Lock()

    def put(self, value: Any) -> Any:
        """A reference to `value`."""
        reference, now = ray.put(value), time.monotonic()
        with self._lock:
            self._kept.append((now, reference))
            while now - self._kept[0][0] > _KEPT_SECONDS:
                self._kept.popleft()
        return reference
