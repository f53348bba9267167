"""One run of a pipeline at a time: threads wait for their turn, and a run inside a run is an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tmd_engines.device.running import interruptible

from .errors import RuntimeFailure


class Turns:
    """Who may use the buffers of a pipeline. A turn belongs to the thread that took it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def take(self, again: bool = False) -> Iterator[None]:
        """Waits until no other thread has a turn. Raises RuntimeFailure if this thread has one, unless `again`."""
        me = threading.get_ident()
        if self._owner == me:
            if not again:
                raise RuntimeFailure(
                    "this pipeline is in the middle of a run in this thread: let the run end (or close what "
                    "decode_chunks returned), or use pipeline.clone()."
                )
            yield
            return
        with self._lock:
            self._owner = me
            try:
                yield
            finally:
                self._owner = None


class TakesTurns(Protocol):
    """What has `turns`."""

    turns: Turns


Arguments = ParamSpec("Arguments")
Given = TypeVar("Given")
Self = TypeVar("Self", bound=TakesTurns)


def in_turn(
    method: Callable[Concatenate[Self, Arguments], Given],
) -> Callable[Concatenate[Self, Arguments], Given]:
    """The method in a turn of its own, in which Ctrl-C stops a running graph."""

    @wraps(method)
    def alone(self: Self, *arguments: Arguments.args, **named: Arguments.kwargs) -> Given:
        with self.turns.take(), interruptible():
            return method(self, *arguments, **named)

    return alone
