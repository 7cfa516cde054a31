"""The gate: who is let in, and when the others should come again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm_server.errors import RETRY_SECONDS, QueueFull, ShuttingDown
from knnlm_server.request_gate import ENDS, LEAST_RETRY_SECONDS, MOST_RETRY_SECONDS, RequestGate


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def gate_of(running: int, clock: Clock) -> RequestGate:
    gate = RequestGate("closed", running, clock)
    gate.open()
    for _ in range(running):
        gate.__enter__()
    return gate


def test_a_closed_gate_and_a_full_one_turn_requests_away() -> None:
    gate = RequestGate("The server is starting.", 1)
    with pytest.raises(ShuttingDown, match="is starting"), gate:
        raise AssertionError("it was let in")
    gate.open()
    with gate, pytest.raises(QueueFull, match="1 requests are running or waiting"), gate:
        raise AssertionError("it was let in")
    with gate:
        pass


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
