"""How many requests are in the server, whether it takes more, and when those that it turns away should come again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from knnlm_server.errors import RETRY_SECONDS, QueueFull, ShuttingDown
from knnlm_server.queue_shares import share_of

LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS = 0.1, 30.0
ENDS = 64
"""Answers of which the pace is taken."""


class RequestGate:
    """Counts requests as they run (``with gate.request(tenant):``) and turns new ones away while closed or full. Closed at first,
    for ``reason``.

    ``room``: requests that may run or wait at the same time. It bounds what is held in memory before the engine knows of
    it; the engine's queue has narrower bounds of its own. ``clock``: seconds.
    """

    def __init__(self, reason: str, room: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._closed: str | None = reason
        self._room = room
        self._tenants: Counter[str] = Counter()
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=ENDS)
        self._idle = asyncio.Event()
        self._idle.set()

    def open(self) -> None:
        """Let requests in."""
        self._closed = None

    def close(self, reason: str) -> None:
        """Turn requests away with a sentence; those that run go on."""
        self._closed = reason

    def note_end(self) -> None:
        """A request that the engine worked on has its answer."""
        self._ends.append(self._clock())

    @property
    def retry_seconds(self) -> float:
        """When to come again where there is no room: after half of what is in has ended, at the pace of the last answers.

        Half of it, since those who are turned away come back at about the same time.
        """
        if len(self._ends) < 2:
            return RETRY_SECONDS
        seconds_an_end = (self._clock() - self._ends[0]) / len(self._ends)
        return min(max(LEAST_RETRY_SECONDS, self._tenants.total() / 2 * seconds_an_end), MOST_RETRY_SECONDS)

    async def idle(self) -> None:
        """Return when no request runs."""
        await self._idle.wait()

    @contextmanager
    def request(self, tenant: str) -> Iterator[None]:
        """Count a request in until the block ends; raise :class:`ShuttingDown` while closed and :class:`QueueFull` while there
        is no room for it, or none for one more of its tenant."""
        if self._closed is not None:
            raise ShuttingDown(self._closed)
        running, own, most = self._tenants.total(), self._tenants[tenant], share_of(self._room, tenant)
        if running >= self._room:
            raise QueueFull(f"{running} requests are running or waiting, and the server takes no more; try again soon.")
        if own >= most:
            raise QueueFull(f"{own} requests of {tenant!r} are running or waiting, the limit for one caller is {most}; try again soon.")
        self._tenants[tenant] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._tenants -= Counter({tenant: 1})  # without those that have none any more
            if not self._tenants:
                self._idle.set()
