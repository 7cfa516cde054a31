"""The scheduler against a cache that remembers whose token lies in which cell: no torch, no model."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from knnlm_server.errors import QueueFull
from knnlm_server.scheduler import RowGroup, Scheduler, Sequence
from knnlm_server.sequence import Limits

FRESH = itertools.count()


class Asked(Sequence):
    """A sequence that ends after so many tokens."""

    max_new_tokens = 1


class FakeRows:
    """Cells that hold token numbers. Every token of these tests is unique, so a cell tells whose it is."""

    def __init__(self, rows: int) -> None:
        self.cells: list[list[int]] = [[] for _ in range(rows)]
        self.moved = 0

    def swap(self, first: int, second: int, length: int) -> None:
        assert first != second, "a swap with itself is work for nothing"
        assert max(len(self.cells[first]), len(self.cells[second])) <= length, "tokens beyond the length stay behind"
        self.cells[first], self.cells[second] = self.cells[second], self.cells[first]
        self.moved += length

    def clear(self, row: int, length: int) -> None:
        assert len(self.cells[row]) <= length, "tokens beyond the length are left over"
        self.cells[row] = []


def sequence(prompt: int, max_new_tokens: int = 1) -> Asked:
    made = Asked(str(next(FRESH)), tuple(next(FRESH) for _ in range(prompt)))
    made.max_new_tokens = max_new_tokens
    return made


def limits(**given: int) -> Limits:
    return Limits(context=1000, **given)


def compute(scheduler: Scheduler[Asked], rows: FakeRows, group: RowGroup[Asked]) -> list[Asked]:
    """What the engine does with a group: each row must hold its own sequence's tokens; then the new ones are written."""
    assert len(group.sequences) == len(group.counts) > 0
    for offset, (seq, count) in enumerate(zip(group.sequences, group.counts, strict=True)):
        cells = rows.cells[group.start + offset]
        assert cells == seq.tokens[: seq.computed], "a row holds another sequence's tokens"
        assert 1 <= count <= seq.remaining
        cells += seq.tokens[seq.computed : seq.computed + count]
    ready = [s for s, count in zip(group.sequences, group.counts, strict=True) if s.remaining == count]
    scheduler.computed(group)
    return ready


def step(scheduler: Scheduler[Asked], rows: FakeRows) -> list[Asked]:
    """One step: every ready sequence gets a token, those that have all of theirs leave. Returns the leaving ones."""
    ready = [seq for group in scheduler.schedule() for seq in compute(scheduler, rows, group)]
    done = []
    for seq in ready:
        seq.tokens.append(next(FRESH))
        if seq.generated == seq.max_new_tokens:
            scheduler.finish(seq)
            done.append(seq)
    return done


def most_steps(running: list[Asked], step_tokens: int, slots: int) -> int:
    """Steps after which the youngest of ``running`` is done, if prompts are read in the order of arrival."""
    budget = max(1, step_tokens - slots)
    reading = sum(math.ceil(max(0, len(s.prompt) - s.computed) / budget) + 1 for s in running)
    return reading + running[-1].max_new_tokens


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals, steps and cancellations in any order."""

    @initialize(slots=st.integers(1, 5), step_tokens=st.integers(1, 12), queue=st.integers(1, 6), queue_tokens=st.integers(1, 60))
    def set_up(self, slots: int, step_tokens: int, queue: int, queue_tokens: int) -> None:
        self.limits = limits(max_concurrent=slots, max_waiting_requests=queue, max_waiting_tokens=queue_tokens)
        self.rows, self.step_tokens = FakeRows(slots), step_tokens
        self.scheduler = Scheduler(self.rows, self.limits, step_tokens)
        self.arrived: list[Asked] = []  # of those that are not done, in order of arrival
        self.deadlines: dict[str, int] = {}  # by request id, from admission on
        self.steps = 0

    @rule(prompt=st.one_of(st.integers(1, 6), st.integers(1, 40)), new_tokens=st.integers(1, 6))
    def arrive(self, prompt: int, new_tokens: int) -> None:
        waiting = list(self.scheduler.waiting)
        tokens = sum(len(s.tokens) for s in waiting) + prompt
        full = len(waiting) >= self.limits.max_waiting_requests
        too_long = bool(waiting) and tokens > self.limits.max_waiting_tokens
        newcomer = sequence(prompt, new_tokens)
        if full or too_long:
            numbers = (len(waiting), self.limits.max_waiting_requests) if full else (tokens, self.limits.max_waiting_tokens)
            with pytest.raises(QueueFull) as caught:
                self.scheduler.add([newcomer])
            assert all(str(number) in str(caught.value) for number in numbers)
            assert list(self.scheduler.waiting) == waiting
        else:
            self.scheduler.add([newcomer])
            self.arrived.append(newcomer)

    @rule(times=st.integers(1, 4))
    def steps_pass(self, times: int) -> None:
        for _ in range(times):
            self._one_step()

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        leaving = data.draw(st.sampled_from(range(len(self.arrived))))
        self.scheduler.finish(self.arrived.pop(leaving))

    def _one_step(self) -> None:
        before = list(self.scheduler.running)
        groups = self.scheduler.schedule()
        admitted = [s for s in self.scheduler.running if not any(s is other for other in before)]
        self._check_admission(before, admitted)
        decoding = [s for s in self.scheduler.running if s.computed >= len(s.prompt)]
        prompts = [s for s in self.scheduler.running if s.computed < len(s.prompt)]
        counts = dict(zip((s.request_id for g in groups for s in g.sequences), (c for g in groups for c in g.counts), strict=True))
        assert len(counts) == sum(len(g.counts) for g in groups), "a sequence is served twice in one step"
        assert all(counts[s.request_id] == 1 for s in decoding), "every decoding row brings one token"
        assert sum(counts.values()) <= max(self.step_tokens, len(decoding) + 1)
        if prompts:
            oldest = next(s for s in self.arrived if any(s is other for other in prompts))
            assert oldest.request_id in counts, "the prompt that waits longest is not read"
            read = groups[-1]
            assert len(read.counts) == 1 or max(read.counts) * len(read.counts) <= 2 * self.step_tokens, "mostly padding"
        for group in groups:
            for seq in compute(self.scheduler, self.rows, group):
                seq.tokens.append(next(FRESH))
        self.steps += 1
        for seq in list(self.scheduler.running):
            if seq.generated == seq.max_new_tokens:
                self.scheduler.finish(seq)
                self.arrived = [s for s in self.arrived if s is not seq]
            else:
                assert self.steps <= self.deadlines[seq.request_id], "an admitted sequence starves"

    def _check_admission(self, before: list[Asked], admitted: list[Asked]) -> None:
        candidates = [s for s in self.arrived if not any(s is other for other in before)]
        assert len(before) + len(admitted) == min(len(self.arrived), self.limits.max_concurrent), "a free row and a waiting request"
        assert sorted(s.request_id for s in admitted) == sorted(s.request_id for s in candidates[: len(admitted)])
        for seq in candidates[: len(admitted)]:
            older = [s for s in self.arrived[: self.arrived.index(seq) + 1] if any(s is other for other in self.scheduler.running)]
            self.deadlines[seq.request_id] = self.steps + most_steps(older, self.step_tokens, self.limits.max_concurrent)

    @invariant()
    def rows_are_in_order(self) -> None:
        running = self.scheduler.running
        assert len(running) <= self.limits.max_concurrent
        for row, cells in enumerate(self.rows.cells):
            expected = running[row].tokens[: running[row].computed] if row < len(running) else []
            assert cells == expected
        reading = [s.computed < len(s.prompt) for s in running]
        assert reading == sorted(reading), "a prompt lies before a decoding row"

    @invariant()
    def nothing_is_lost(self) -> None:
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(s.request_id for s in known) == sorted(s.request_id for s in self.arrived)
        assert self.scheduler.idle == (not self.arrived)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        work = sum(len(s.tokens) + s.max_new_tokens + 2 for s in self.arrived)
        for _ in range(work):
            self._one_step()
        assert self.scheduler.idle
        self.rows_are_in_order()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


def test_a_long_prompt_is_read_while_short_requests_come_and_go_without_end() -> None:
    slots, step_tokens = 4, 10
    rows = FakeRows(slots)
    scheduler = Scheduler(rows, limits(max_concurrent=slots), step_tokens)
    for number in range(2):
        scheduler.add([sequence(1, 2 + number)])
    step(scheduler, rows)
    patient = sequence(30, 1)
    scheduler.add([patient])
    most = most_steps([patient], step_tokens, slots) + 1
    for _ in range(most):
        scheduler.add([sequence(8, 2)])
        if any(done is patient for done in step(scheduler, rows)):
            return
    pytest.fail(f"not served after {most} steps")


def test_prompts_are_read_together_up_to_the_budget() -> None:
    rows = FakeRows(4)
    scheduler = Scheduler(rows, limits(max_concurrent=4), step_tokens=10)
    short, other, long = sequence(4), sequence(3), sequence(20)
    for seq in (short, other, long):
        scheduler.add([seq])
    (group,) = scheduler.schedule()
    assert group.start == 0
    assert group.counts == [4, 3, 3]


def test_rows_that_would_mostly_be_padding_wait_for_the_next_step() -> None:
    rows = FakeRows(4)
    scheduler = Scheduler(rows, limits(max_concurrent=4), step_tokens=12)
    for seq in (sequence(9), sequence(1), sequence(1), sequence(1)):
        scheduler.add([seq])
    (group,) = scheduler.schedule()
    assert group.counts == [9, 1], "three rows as wide as 9 would be 27 cells for 11 tokens"


def test_all_rows_decode_even_where_they_are_more_than_the_budget() -> None:
    rows = FakeRows(4)
    scheduler = Scheduler(rows, limits(max_concurrent=4), step_tokens=2)
    for seq in [sequence(1, 50) for _ in range(3)]:
        scheduler.add([seq])
    for _ in range(3):
        step(scheduler, rows)
    late = sequence(5, 2)
    scheduler.add([late])
    decoding, prompts = scheduler.schedule()
    assert (decoding.start, decoding.counts) == (0, [1, 1, 1])
    assert (prompts.start, prompts.counts) == (3, [1]), "a prompt gets one token at least"


def test_one_request_longer_than_the_queue_is_taken_when_nothing_else_waits() -> None:
    scheduler = Scheduler(FakeRows(1), limits(max_concurrent=1, max_waiting_tokens=10), step_tokens=4)
    scheduler.add([sequence(50)])
    with pytest.raises(QueueFull, match="51 prompt tokens would be waiting, the limit is 10"):
        scheduler.add([sequence(1)])


def test_the_queue_counts_requests_and_says_so() -> None:
    scheduler = Scheduler(FakeRows(1), limits(max_concurrent=1, max_waiting_requests=2), step_tokens=4)
    for _ in range(2):
        scheduler.add([sequence(1)])
    with pytest.raises(QueueFull, match="2 requests are waiting, the limit is 2"):
        scheduler.add([sequence(1)])


def test_importing_the_scheduler_imports_neither_torch_nor_grpc() -> None:
    code = "import sys, knnlm_server.scheduler; print([m for m in ('torch', 'transformers', 'faiss', 'grpc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
