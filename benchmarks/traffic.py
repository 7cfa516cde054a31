"""Requests as many clients send them: whole ones, ones that are given up, ones in a hurry, ones read slowly; and arrivals.

Open loop: requests come when chance (a Poisson process) says, whether or not the server keeps up with them. Closed loop:
each client sends its next request when its last one has ended.
"""

from __future__ import annotations

import asyncio
import enum
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from benchmarks.streams import PATIENT, Answer, Manner, Streams, greedy

DEADLINE_SECONDS = 0.1
PAUSE_SECONDS = 0.05
SLOW_NEIGHBORS = 20
CONNECTIONS = 4
LONGEST_PROMPT, LONGEST_COMPLETION = 200, 64
KNOWN_PROMPTS, KNOWN_SHARE = 16, 0.25

# Each connection is one of its own, and a slow reader's takes in no more than it reads.
_OWN = ("grpc.use_local_subchannel_pool", 1)
_NARROW = [_OWN, ("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


class Kind(enum.Enum):
    """How a client means a request."""

    WHOLE = "whole"
    CANCELLED = "cancelled at a random token"
    HURRIED = "100 ms deadline"
    SLOW = "read slowly"


SHARES = {Kind.CANCELLED: 0.2, Kind.HURRIED: 0.1, Kind.SLOW: 0.05}


@dataclass(frozen=True)
class Wanted:
    """A request: so many ``tokens`` after a prompt. ``known``: which of the prompts that were answered before (None: a new one)."""

    kind: Kind
    prompt: tuple[int, ...]
    tokens: int
    manner: Manner = PATIENT
    known: int | None = None


@dataclass(frozen=True)
class Ended:
    """A request and what came of it."""

    wanted: Wanted
    answer: Answer


class Mix:
    """A source of requests, the same for the same ``seed``: prompts of random tokens that fit ``context`` with what is asked."""

    def __init__(self, vocabulary: int, context: int, seed: int) -> None:
        self._vocabulary, self._seed = vocabulary, seed
        self._longest_prompt, self._longest_completion = min(LONGEST_PROMPT, context // 2), min(LONGEST_COMPLETION, context // 2)
        self._chance = random.Random(seed)
        self.known = [self._whole(random.Random(f"{seed} {number}"), number) for number in range(KNOWN_PROMPTS)]

    def draw(self) -> Wanted:
        """The next request."""
        chance = self._chance
        whole = chance.choice(self.known) if chance.random() < KNOWN_SHARE else self._whole(chance, None)
        point = chance.random()
        for kind, share in SHARES.items():
            if point < share:
                return Wanted(kind, whole.prompt, whole.tokens, self._manner(kind, whole.tokens), whole.known)
            point -= share
        return whole

    def _whole(self, chance: random.Random, known: int | None) -> Wanted:
        length, tokens = chance.randint(4, self._longest_prompt), chance.randint(4, self._longest_completion)
        return Wanted(Kind.WHOLE, tuple(chance.randrange(self._vocabulary) for _ in range(length)), tokens, known=known)

    def _manner(self, kind: Kind, tokens: int) -> Manner:
        if kind is Kind.CANCELLED:
            return Manner(cancel_after=self._chance.randint(1, tokens))
        return Manner(deadline=DEADLINE_SECONDS) if kind is Kind.HURRIED else Manner(pause=PAUSE_SECONDS)


class Clients:
    """Connections to one server, over which requests go in turn."""

    def __init__(self, address: str) -> None:
        # An option of its own makes gRPC open a connection of its own.
        self._usual = [Streams(address, [_OWN]) for _ in range(CONNECTIONS)]
        self._narrow = Streams(address, _NARROW)
        self._turn = 0

    async def ask(self, wanted: Wanted) -> Ended:
        """Send a request and read its answer as its kind does."""
        self._turn += 1
        slow = wanted.kind is Kind.SLOW
        streams = self._narrow if slow else self._usual[self._turn % CONNECTIONS]
        request = greedy(wanted.prompt, wanted.tokens, retrieval=True, neighbors=SLOW_NEIGHBORS if slow else 0)
        return Ended(wanted, await streams.call(request, wanted.manner))

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        for streams in (*self._usual, self._narrow):
            await self._stack.enter_async_context(streams)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self._stack.aclose()


async def open_loop(
    clients: Clients, mix: Mix, rate: float, seconds: float, chance: random.Random, meanwhile: Sequence[Callable[[], Awaitable[None]]] = ()
) -> list[Ended]:
    """Requests at ``rate`` a second for so long, and all their ends. ``meanwhile`` is started with the first."""
    others = [asyncio.ensure_future(start()) for start in meanwhile]
    calls: list[asyncio.Task[Ended]] = []
    due = time.perf_counter()
    end = due + seconds
    while (due := due + chance.expovariate(rate)) < end:
        # A late start is caught up with at once: arrivals wait for nothing.
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        calls.append(asyncio.create_task(clients.ask(mix.draw())))
    await asyncio.gather(*others)
    return list(await asyncio.gather(*calls))


async def closed_loop(clients: Clients, draw: Callable[[], Wanted], count: int, seconds: float) -> list[Ended]:
    """``count`` clients at once for so long, and all ends."""
    ends: list[Ended] = []
    end = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < end:
            ends.append(await clients.ask(draw()))

    await asyncio.gather(*(client() for _ in range(count)))
    return ends
