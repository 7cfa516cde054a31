"""Threads on which requests are read, which means above all tokenised: short ones never wait for long ones. Knows no service."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from knnlm_server.errors import QueueFull

LONG_BYTES = 64 * 1024
"""Messages of at least so many bytes are long; tokenising a shorter one takes some milliseconds."""
MOST_WAITING_BYTES = 64 * 1024 * 1024
"""Of the messages of one lane, those that are being read included; a single one is always taken."""
SHORT_THREADS = 2

Result = TypeVar("Result")


class ReadingLanes:
    """A lane for short messages and one for long ones, which delay one another and nobody else. To be used from one event loop."""

    def __init__(self, long_bytes: int = LONG_BYTES, most_waiting_bytes: int = MOST_WAITING_BYTES) -> None:
        self._long_bytes = long_bytes
        self._short = _Lane("knnlm-read-short", SHORT_THREADS, most_waiting_bytes)
        self._long = _Lane("knnlm-read-long", 1, most_waiting_bytes)

    async def read(self, message: Message, function: Callable[[], Result]) -> Result:
        """What ``function`` makes of a message, on a thread of the lane that the message's size chooses, in the caller's context.

        Raises :class:`QueueFull` where too much waits there. Where the caller is cancelled before its turn, nothing is read.
        """
        size = message.ByteSize()
        lane = self._long if size >= self._long_bytes else self._short
        return await asyncio.wrap_future(lane.submit(size, partial(contextvars.copy_context().run, function)))

    def close(self) -> None:
        """End the threads after what they are reading; nothing that waits is read."""
        self._short.close()
        self._long.close()


class _Lane:
    """Threads, and the bytes of what waits for them."""

    def __init__(self, name: str, threads: int, most_bytes: int) -> None:
        self._threads = ThreadPoolExecutor(threads, name)
        self._most_bytes, self._bytes, self._lock = most_bytes, 0, threading.Lock()

    def submit(self, size: int, function: Callable[[], Result]) -> Future[Result]:
        with self._lock:
            if self._bytes and self._bytes + size > self._most_bytes:
                raise QueueFull(
                    f"{self._bytes + size} bytes of requests would be waiting to be tokenised, the limit is {self._most_bytes};"
                    " try again later."
                )
            self._bytes += size
        # A cancelled future waits for its turn like any other; what it was to read must not wait with it.
        held = [function]
        future = self._threads.submit(lambda: held.pop()())
        future.add_done_callback(lambda _: self._done(size, held))
        return future

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _done(self, size: int, held: list[Callable[[], Any]]) -> None:
        held.clear()
        with self._lock:
            self._bytes -= size
