"""A reader who leaves too many events unread is ended, its row is free for others, and nobody else notices."""

from __future__ import annotations

import asyncio

import pytest

from knnlm_server import listeners
from knnlm_server.errors import ReadTooSlowly
from knnlm_server.sequence import FinishEvent, TokenEvent
from tests.engine.harness import Parts
from tests.engine.test_async_engine import Start, endless, run, some_requests, start

__all__ = ["start"]


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "SECONDS_TO_CATCH_UP", 0.0)


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
    monkeypatch.setattr(listeners, "SECONDS_TO_CATCH_UP", 1e9)
    engine = start(gpt2, max_unread_events=3)

    async def life() -> list[TokenEvent | FinishEvent]:
        events = engine.outer.generate(endless("late"))
        first = await anext(events)
        await engine.until_idle()
        return [first, *[event async for event in events]]

    *tokens, last = run(life())
    assert [event.index for event in tokens] == list(range(60))
    assert isinstance(last, FinishEvent)
