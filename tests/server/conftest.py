"""A real server on a free port around a fake engine, on an event loop of its own thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from knnlm_server.app import GenerationServer
from tests.server.fake_engine import FakeEngine

WAIT_SECONDS = 30.0


class RunningServer:
    """A server and the loop that it runs on."""

    def __init__(self, engine: FakeEngine, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        self.engine = engine
        self.server = GenerationServer(engine, **options)
        self._loop = loop

    @property
    def target(self) -> str:
        return self.server.address

    def submit(self, coroutine: Any) -> Future[Any]:
        """Run on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


@contextmanager
def running(engine: FakeEngine, **options: Any) -> Iterator[RunningServer]:
    """A server, stopped at the end; ``options`` are those of :class:`GenerationServer`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = RunningServer(engine, loop, **options)
    try:
        running.submit(running.server.start()).result(WAIT_SECONDS)
        yield running
        running.submit(running.server.stop(grace=0)).result(WAIT_SECONDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(WAIT_SECONDS)
        loop.close()


@pytest.fixture
def start_server() -> Iterator[Callable[..., RunningServer]]:
    """Start a server around an engine, with options of :class:`GenerationServer`; it is stopped at the end of the test."""
    with ExitStack() as stack:
        yield lambda engine, **options: stack.enter_context(running(engine, **options))


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """The command sets the process's log up; the tests of others want their own back."""
    root, own = logging.getLogger(), logging.getLogger("knnlm_server")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])
