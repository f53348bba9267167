"""The bodies of requests as they come in: how large one may be, all of them together, and how slow.

A body lies in memory until its request is answered, so many large ones at once could take all of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import Refusal

if TYPE_CHECKING:
    from starlette.types import Message, Receive

_PAUSE_SECONDS = 30.0
_TOGETHER = 8
"""All bodies together may be as large as so many of the largest one."""


class Intake:
    """Counts the bytes of all bodies of an application. For its event loop."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0

    def check(self, length: str) -> None:
        """Raises Refusal if a body is too large by the header Content-Length."""
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_long()

    @contextmanager
    def open(self, receive: Receive) -> Iterator[Receive]:
        """What gives the messages of one request until it is answered, whatever their number and its header say.

        Receiving raises Refusal, which the application answers.
        """
        seen, is_whole = 0, False

        async def bounded() -> Message:
            nonlocal seen, is_whole
            if is_whole:  # from now on it only waits for the client to go
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), _PAUSE_SECONDS)
            except TimeoutError:
                why = f"nothing of the request's body came for {_PAUSE_SECONDS:g} s: send it again."
                raise Refusal(why, 408, "timeout") from None
            size = len(message.get("body", b""))
            seen, self._held = seen + size, self._held + size
            is_whole = not message.get("more_body", False)
            if seen > self._most:
                raise self._too_long()
            if self._held > self._most * _TOGETHER:
                raise Refusal("too many large requests come at once: send it again.", 429, "busy", retry_after=2)
            return message

        try:
            yield bounded
        finally:
            self._held -= seen

    def _too_long(self) -> Refusal:
        size = f"{self._most / 1e6:.3g} MB"
        return Refusal(f"the request is larger than {size}, which this server allows.", 413, "too_large")
