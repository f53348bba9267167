"""A stage in a thread of its own, as a stream of messages that can be stopped."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from ray.exceptions import RayError

from tmd_engines.device.running import AGAIN_SECONDS, stop_step

from ..local.worker import verdict
from .messages import LOST, Broken, Made, Message

_LOG = logging.getLogger("tmd_serve.jobs")

Send = Callable[[Message], bool]


class StageThread:
    """Runs stages one after the other, always in the same thread."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="stage")

    async def stream(self, work: Callable[[Send], Made]) -> AsyncIterator[Message]:
        """What `work` sends, and at last what it returned or how it failed.

        `send` returns False when the reader has gone. A reader that goes also stops the step that runs.
        """
        loop, messages = asyncio.get_running_loop(), asyncio.Queue[Message | None]()
        gone, thread = threading.Event(), 0

        def send(message: Message) -> bool:
            loop.call_soon_threadsafe(messages.put_nowait, message)
            return not gone.is_set()

        def run() -> Message:
            nonlocal thread
            thread = threading.get_ident()
            try:
                return work(send)
            except RayError as error:
                return Broken(LOST, f"{type(error).__name__}: {error}".splitlines()[0])
            except Exception as error:
                if gone.is_set():
                    return Broken("cancelled", "the job was cancelled.")
                code, message = verdict(error)
                if code == "server_error":
                    _LOG.error("a stage failed", exc_info=error)
                return Broken(code, message)

        future = loop.run_in_executor(self._pool, run)
        future.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            yield future.result()
        finally:
            gone.set()
            while not future.done():
                stop_step(thread)
                await asyncio.wait([future], timeout=AGAIN_SECONDS)
