"""Where requests are read: long ones hold up no short ones, what waits is bounded, and what was cancelled is not read."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

import pytest

from knnlm_server.errors import QueueFull
from knnlm_server.pb import generation_pb2 as pb
from knnlm_server.reading_lanes import ReadingLanes
from tests.server.conftest import WAIT_SECONDS

SHORT, LONG = pb.TokenizeRequest(text="a"), pb.TokenizeRequest(text="a" * 100)


@pytest.fixture
def lanes() -> Iterator[ReadingLanes]:
    made = ReadingLanes(long_bytes=100, most_waiting_bytes=250)
    yield made
    made.close()


def test_a_short_message_does_not_wait_for_long_ones(lanes: ReadingLanes) -> None:
    go_on = threading.Event()

    async def read() -> list[str]:
        long = [asyncio.create_task(lanes.read(LONG, lambda: go_on.wait(WAIT_SECONDS))) for _ in range(2)]
        short = await asyncio.wait_for(lanes.read(SHORT, lambda: "short"), WAIT_SECONDS)
        assert not any(task.done() for task in long)
        go_on.set()
        return [short, *map(str, await asyncio.gather(*long))]

    assert asyncio.run(read()) == ["short", "True", "True"]


def test_more_than_the_bound_is_told_to_come_again_and_what_is_done_makes_room(lanes: ReadingLanes) -> None:
    go_on = threading.Event()

    async def read() -> None:
        waiting = [asyncio.create_task(lanes.read(LONG, lambda: go_on.wait(WAIT_SECONDS))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match=f"{3 * LONG.ByteSize()} bytes of requests would be waiting .* limit is 250"):
            await lanes.read(LONG, lambda: None)
        go_on.set()
        await asyncio.gather(*waiting)
        assert await lanes.read(LONG, lambda: 7) == 7

    asyncio.run(read())


def test_a_single_message_is_taken_however_long(lanes: ReadingLanes) -> None:
    assert asyncio.run(lanes.read(pb.TokenizeRequest(text="a" * 1000), lambda: 7)) == 7


def test_one_that_is_cancelled_before_its_turn_is_not_read_and_takes_no_room(lanes: ReadingLanes) -> None:
    go_on, read_anyway = threading.Event(), threading.Event()

    async def read() -> None:
        first = asyncio.create_task(lanes.read(LONG, lambda: go_on.wait(WAIT_SECONDS)))
        second = asyncio.create_task(lanes.read(LONG, read_anyway.set))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        third = asyncio.create_task(lanes.read(LONG, lambda: 3))
        await asyncio.sleep(0)
        go_on.set()
        assert (await first, await third) == (True, 3)

    asyncio.run(read())
    assert not read_anyway.is_set()


def test_nothing_of_one_that_is_cancelled_before_its_turn_is_kept_until_then(lanes: ReadingLanes) -> None:
    go_on = threading.Event()

    async def give_up_waiting() -> weakref.ref[threading.Event]:
        large = threading.Event()  # anything that can be seen to be gone
        second = asyncio.create_task(lanes.read(LONG, large.set))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait([second])
        return weakref.ref(large)

    async def read() -> None:
        first = asyncio.create_task(lanes.read(LONG, lambda: go_on.wait(WAIT_SECONDS)))
        await asyncio.sleep(0)
        kept = await give_up_waiting()
        gc.collect()
        still_there = kept() is not None
        go_on.set()
        await first
        assert not still_there

    asyncio.run(read())


def test_a_message_is_read_in_the_context_of_its_call_and_errors_come_back(lanes: ReadingLanes) -> None:
    number: ContextVar[int] = ContextVar("number")

    def fail() -> None:
        raise ValueError(f"in {number.get()}")

    async def read() -> None:
        number.set(5)
        await lanes.read(SHORT, fail)

    with pytest.raises(ValueError, match="in 5"):
        asyncio.run(read())
