"""The asyncio side of an engine, wherever that runs: each request's way there and back. Knows no torch and no gRPC."""

from __future__ import annotations

import asyncio
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from operator import methodcaller
from typing import TYPE_CHECKING

from knnlm.errors import KNNLMError
from knnlm_server.errors import ReadTooSlowly, ShuttingDown
from knnlm_server.sequence import (
    Arrival,
    FinishEvent,
    GenerationRequest,
    Limits,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    TokenEvent,
)

if TYPE_CHECKING:
    from knnlm_server.engine_loop import Content, Deliveries

_log = logging.getLogger(__name__)

SECONDS_TO_CATCH_UP = 1.0


class _Listener:
    """One request's way back: what the engine hands out arrives in the event loop of the request.

    One who is more than ``most_unread`` events behind, and some time later still, is ended: what was not read is dropped
    for a :class:`ReadTooSlowly`, and ``leave`` is called. Who waits for more is not behind.
    """

    def __init__(self, most_unread: int, leave: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self._most_unread, self._leave = most_unread, leave
        self._held: list[tuple[float, Content]] = []
        self._wanted: asyncio.Future[None] | None = None
        self._not_before = 0.0
        self._judging: asyncio.TimerHandle | None = None
        self._ended = False

    def take(self, content: Content) -> None:
        """Keep what the engine handed out."""
        if self._ended:
            return
        now = self.loop.time()
        self._held.append((now, content))
        if self._wanted is not None:
            if now >= self._not_before or not isinstance(content, TokenEvent):
                self._wake()
        elif self._judging is None and len(self._held) > self._most_unread:
            # Not at once: where the loop itself was busy, events of many steps arrive together.
            self._judging = self.loop.call_later(SECONDS_TO_CATCH_UP, self._judge)

    async def next(self, not_before: float = 0.0) -> list[tuple[float, Content]]:
        """All that has arrived, at least one, each with its moment by the loop's clock. Tokens alone are not handed out
        ``not_before`` that moment."""
        now = self.loop.time()
        if not self._held or (now < not_before and all(isinstance(content, TokenEvent) for _, content in self._held)):
            self._not_before, self._wanted = not_before, self.loop.create_future()
            timer = self.loop.call_at(not_before, self._due) if not_before > now else None
            try:
                await self._wanted
            finally:
                self._wanted = None
                if timer is not None:
                    timer.cancel()
        held, self._held = self._held, []
        return held

    def _due(self) -> None:
        if self._held:
            self._wake()

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)

    def _judge(self) -> None:
        self._judging = None
        behind = len(self._held)
        if behind <= self._most_unread or self._wanted is not None:
            return
        self._ended = True
        error = ReadTooSlowly(f"The client is {behind} events behind, and at most {self._most_unread} are kept; read them as they come.")
        self._held = [(self.loop.time(), error)]
        self._leave()


class StreamingEngine(ABC):
    """Streams of events for asyncio. Subclasses bring commands to the engine (:meth:`_submit`, :meth:`_forget`) and what it
    hands out to :meth:`_tell`, from any thread.

    Commands name a method of :class:`~knnlm_server.engine.DecodingEngine`, so that this side need not import it.
    """

    def __init__(self) -> None:
        self._listeners: dict[str, _Listener] = {}
        # Held to take a request in or to close the door, so that none slips in after the last look at the listeners.
        self._door = threading.Lock()
        self._open = False

    @property
    @abstractmethod
    def _limits(self) -> Limits:
        """The limits in force."""

    @abstractmethod
    def _submit(self, request_id: str, command: methodcaller) -> None:
        """Bring a command to the engine."""

    @abstractmethod
    def _forget(self, request_id: str) -> None:
        """Bring it that a request is wanted no more."""

    @property
    def working(self) -> bool:
        """Whether requests are answered: from :meth:`start` to :meth:`stop`, or to an error that ended the engine."""
        return self._open

    async def stream(self, request: GenerationRequest, interval: float = 0.0) -> AsyncGenerator[list[Arrival], None]:
        """Token events, and one finish event for each sample, as many at a time as there are; closing the generator cancels
        the request. Tokens that come within ``interval`` seconds of the last time wait for others; an end does not.

        Raises :class:`~knnlm_server.errors.QueueFull` where there is no room to wait,
        :class:`~knnlm_server.errors.DatastoreNotLoaded` for a name that is not known, and :class:`ReadTooSlowly` where too
        many events were left unread.
        """
        listener = self._listen(request.request_id, methodcaller("add", request))
        running, not_before = request.samples, 0.0
        try:
            while running:
                arrived: list[Arrival] = []
                failure: KNNLMError | None = None
                for at, content in await listener.next(not_before):
                    if isinstance(content, KNNLMError):
                        failure = content
                        break
                    assert isinstance(content, TokenEvent | FinishEvent)
                    running -= isinstance(content, FinishEvent)
                    arrived.append(Arrival(at, content))
                not_before = listener.loop.time() + interval
                if arrived:
                    yield arrived
                if failure is not None and running:  # what comes after the last finish is not this request's any more
                    raise failure
        finally:
            self._leave(request.request_id)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        """The events of :meth:`stream`, one by one."""
        async with aclosing(self.stream(request)) as stream:
            async for arrived in stream:
                for _, event in arrived:
                    yield event

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of given tokens; cancelling the task cancels the request."""
        result = await self._result(request.request_id, methodcaller("add_score", request))
        assert isinstance(result, ScoreResult)
        return result

    async def retrieve(self, request: RetrieveRequest) -> RetrieveResult:
        """Neighbours of a context; cancelling the task cancels the request."""
        result = await self._result(request.request_id, methodcaller("add_retrieve", request))
        assert isinstance(result, RetrieveResult)
        return result

    async def _result(self, request_id: str, command: methodcaller) -> Content:
        """The one thing that a request is answered with."""
        listener = self._listen(request_id, command)
        try:
            [(_, content), *_others] = await listener.next()
        finally:
            self._leave(request_id)
        if isinstance(content, KNNLMError):
            raise content
        return content

    def _listen(self, request_id: str, command: methodcaller) -> _Listener:
        """Bring a command to the engine and wait for what it hands out."""
        listener = _Listener(self._limits.max_unread_events, lambda: self._leave(request_id))
        with self._door:
            if not self._open:
                raise ShuttingDown("The server is being stopped and takes no new requests.")
            self._listeners[request_id] = listener
            self._submit(request_id, command)
        return listener

    def _leave(self, request_id: str) -> None:
        """Forget a request; if it still runs, the engine frees its row before the next step."""
        if self._listeners.pop(request_id, None) is not None:
            self._forget(request_id)

    def _close(self) -> None:
        with self._door:
            self._open = False

    def _end_all(self, error: KNNLMError) -> None:
        """Take no more requests, and end those that run."""
        self._close()
        self._tell([(request_id, error) for request_id in list(self._listeners)])

    def _tell(self, contents: Deliveries) -> None:
        """Hand each request what the engine has for it: one call for each event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Listener, Content]]] = {}
        for request_id, content in contents:
            listener = self._listeners.get(request_id)
            if listener is not None:
                by_loop.setdefault(listener.loop, []).append((listener, content))
        for loop, deliveries in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, deliveries)
            except RuntimeError:
                _log.info("an event loop closed before its %d events arrived", len(deliveries))


def _deliver(deliveries: list[tuple[_Listener, Content]]) -> None:
    for listener, content in deliveries:
        listener.take(content)
