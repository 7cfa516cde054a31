"""The gate: who is let in, and when the others should come again."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_server.errors import RETRY_SECONDS, QueueFull, ShuttingDown
from knnlm_server.request_gate import ENDS, LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS, RequestGate

OPEN = ExitStack()  # never closed: requests that go on for ever


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def gate_of(running: int, clock: Clock) -> RequestGate:
    gate = RequestGate("closed", running, clock)
    gate.open()
    for _ in range(running):
        OPEN.enter_context(gate.request(""))
    return gate


def test_a_closed_gate_and_a_full_one_turn_requests_away() -> None:
    gate = RequestGate("The server is starting.", 1)
    with pytest.raises(ShuttingDown, match="is starting"), gate.request("a"):
        raise AssertionError("it was let in")
    gate.open()
    with gate.request("a"), pytest.raises(QueueFull, match="1 requests are running or waiting"), gate.request("b"):
        raise AssertionError("it was let in")
    with gate.request("b"):
        pass


@pytest.mark.parametrize(("tenant", "most"), [("greedy", 14), ("", 16)])
def test_a_tenant_leaves_room_for_others_and_callers_without_a_name_leave_none(tenant: str, most: int) -> None:
    gate = RequestGate("closed", 16)
    gate.open()
    with ExitStack() as running:
        for _ in range(most):
            running.enter_context(gate.request(tenant))
        with pytest.raises(QueueFull, match=f"{most} requests "), gate.request(tenant):
            raise AssertionError("it was let in")
        if tenant:
            with gate.request("modest"), gate.request("modest"), pytest.raises(QueueFull, match="16 requests are"), gate.request("third"):
                raise AssertionError("it was let in")
    with gate.request(tenant):
        pass


def test_the_gate_is_idle_when_no_request_is_in() -> None:
    async def wait() -> None:
        gate = RequestGate("closed", 4)
        gate.open()
        await asyncio.wait_for(gate.idle(), 1)
        with gate.request("a"):
            with gate.request("b"):
                pass
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(gate.idle(), 0.01)
        await asyncio.wait_for(gate.idle(), 1)

    asyncio.run(wait())


def test_nothing_is_known_of_the_pace_at_first() -> None:
    gate = gate_of(100, Clock())
    assert gate.retry_seconds == RETRY_SECONDS
    gate.note_end()
    assert gate.retry_seconds == RETRY_SECONDS


@given(running=st.integers(1, 300), pace=st.floats(0.05, 500), ends=st.integers(2, 3 * ENDS))
def test_one_comes_again_when_half_has_ended_at_the_pace_of_the_last(running: int, pace: float, ends: int) -> None:
    clock = Clock()
    gate = gate_of(running, clock)
    for _ in range(ends):
        gate.note_end()
        clock.now += 1 / pace
    assert LEAST_RETRY_SECONDS <= gate.retry_seconds <= MOST_RETRY_SECONDS
    expected = min(max(LEAST_RETRY_SECONDS, running / 2 / pace), MOST_RETRY_SECONDS)
    assert gate.retry_seconds == pytest.approx(expected, rel=1e-6)


def test_a_server_that_has_answered_nothing_for_long_asks_for_more_patience() -> None:
    clock = Clock()
    gate = gate_of(8, clock)
    for _ in range(2):
        gate.note_end()
    clock.now += 4.0
    assert gate.retry_seconds == 8.0
    clock.now += 100.0
    assert gate.retry_seconds == MOST_RETRY_SECONDS
