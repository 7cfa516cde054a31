"""A reader who leaves too many events unread is ended, its row is free for others, and nobody else notices."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from knnlm_server import streaming_engine
from knnlm_server.errors import EngineFailed, ReadTooSlowly
from knnlm_server.sequence import Arrival, FinishEvent, FinishReason, TokenEvent
from tests.engine.harness import Parts
from tests.engine.test_async_engine import Start, endless, run, some_requests, start

__all__ = ["start"]


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_engine, "SECONDS_TO_CATCH_UP", 0.0)


def test_one_who_reads_nothing_is_ended_and_its_row_is_free(gpt2: Parts, start: Start, no_patience: None) -> None:
    engine = start(gpt2, max_concurrent=2, max_unread_events=3)

    async def life() -> None:
        events = engine.outer.generate(endless("slow"))
        await anext(events)
        await engine.until_idle()
        # What was not read is not kept.
        with pytest.raises(ReadTooSlowly, match="at most 3 are kept"):
            await anext(events)

    run(life())
    assert engine.inner.idle


def test_others_go_on_as_if_alone(gpt2: Parts, start: Start, no_patience: None) -> None:
    asked = some_requests(2)
    alone = [run(start(gpt2).generate(one)) for one in asked]
    engine = start(gpt2, max_concurrent=4, max_unread_events=3)

    async def beside_a_slow_one() -> list[list[int]]:
        events = engine.outer.generate(endless("slow"))
        await anext(events)
        others = list(await asyncio.gather(*(engine.generate(one) for one in asked)))
        with pytest.raises(ReadTooSlowly):
            [event async for event in events]
        return others

    assert run(beside_a_slow_one()) == alone


def test_one_who_catches_up_in_time_is_not_ended(gpt2: Parts, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming_engine, "SECONDS_TO_CATCH_UP", 1e9)
    engine = start(gpt2, max_unread_events=3)

    async def life() -> list[TokenEvent | FinishEvent]:
        events = engine.outer.generate(endless("late"))
        first = await anext(events)
        await engine.until_idle()
        return [first, *[event async for event in events]]

    *tokens, last = run(life())
    assert [event.index for event in tokens] == list(range(60))
    assert isinstance(last, FinishEvent)


def test_one_who_waits_for_more_is_not_behind(gpt2: Parts, start: Start, no_patience: None) -> None:
    engine = start(gpt2, max_unread_events=3)

    async def life() -> list[list[Arrival]]:
        # All tokens but the first wait for a moment that never comes; the finish does not.
        return [arrived async for arrived in engine.outer.stream(endless("patient"), interval=1e9)]

    *tokens, last = [arrival.event for arrived in run(life()) for arrival in arrived]
    assert [event.index for event in tokens] == list(range(60))
    assert isinstance(last, FinishEvent)


TOKEN = TokenEvent(0, 1, "a", "a")


def test_tokens_wait_for_their_moment_and_nothing_else_does() -> None:
    async def life() -> None:
        listener = streaming_engine._Listener(10, lambda: None)
        loop = asyncio.get_running_loop()
        listener.take(TOKEN)
        assert [content for _, content in await listener.next(loop.time())] == [TOKEN]
        listener.take(TOKEN)
        moment = loop.time() + 0.02
        assert [content for _, content in await listener.next(moment)] == [TOKEN]
        assert loop.time() >= moment - time.get_clock_info("monotonic").resolution
        for end in (FinishEvent(FinishReason.LENGTH, "", 1, 1), EngineFailed("It broke.")):
            listener.take(TOKEN)
            waiting = asyncio.ensure_future(listener.next(loop.time() + 1e6))
            for _ in range(3):
                await asyncio.sleep(0)
                listener.take(TOKEN)
            assert not waiting.done()
            listener.take(end)
            assert [content for _, content in await waiting] == [TOKEN] * 4 + [end]
            listener.take(end)
            assert [content for _, content in await listener.next(loop.time() + 1e6)] == [end]

    run(life())


async def _until_failed(stream: AsyncGenerator[list[Arrival], None]) -> AsyncGenerator[list[Arrival], None]:
    try:
        async for arrived in stream:
            yield arrived
    except EngineFailed:
        return
    pytest.fail("the stream ended as if nothing had happened")


def test_an_error_waits_for_no_interval(gpt2: Parts, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(gpt2)

    async def life() -> int:
        stream = engine.outer.stream(endless("broken"), interval=1e9)
        first = await anext(stream)
        monkeypatch.setattr(engine.inner, "step", lambda: 1 / 0)
        rest = [arrived async for arrived in _until_failed(stream)]
        return len(first) + sum(map(len, rest))

    assert run(life()) >= 1
