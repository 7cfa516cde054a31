"""The ways back from the engine's thread: what it hands out for a request arrives in the event loop of that request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from knnlm.errors import KNNLMError
from knnlm_server.errors import ReadTooSlowly
from knnlm_server.sequence import FinishEvent, RetrieveResult, ScoreResult, TokenEvent

Content = TokenEvent | FinishEvent | ScoreResult | RetrieveResult | KNNLMError

SECONDS_TO_CATCH_UP = 1.0


class Listener:
    """One request's way back: what the engine hands out arrives in the event loop of the request.

    One who is more than ``most_unread`` events behind, and some time later still, is ended: what was not read is dropped
    for a :class:`ReadTooSlowly`, and ``leave`` is called.
    """

    def __init__(self, most_unread: int, leave: Callable[[], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.contents: asyncio.Queue[Content] = asyncio.Queue()
        self._most_unread, self._leave = most_unread, leave
        self._judging: asyncio.TimerHandle | None = None
        self._ended = False

    def take(self, content: Content) -> None:
        """Keep what the engine handed out, to be read from ``contents``."""
        if self._ended:
            return
        self.contents.put_nowait(content)
        if self._judging is None and self.contents.qsize() > self._most_unread:
            # Not at once: where the loop itself was busy, events of many steps arrive together.
            self._judging = self.loop.call_later(SECONDS_TO_CATCH_UP, self._judge)

    def _judge(self) -> None:
        self._judging = None
        behind = self.contents.qsize()
        if behind <= self._most_unread:
            return
        self._ended = True
        while not self.contents.empty():
            self.contents.get_nowait()
        self.contents.put_nowait(
            ReadTooSlowly(f"The client is {behind} events behind, and at most {self._most_unread} are kept; read them as they come.")
        )
        self._leave()


def deliver(deliveries: list[tuple[Listener, Content]]) -> None:
    """Hand contents to the listeners that they are for; to be called in their event loop."""
    for listener, content in deliveries:
        listener.take(content)
