"""The scheduler against a cache that remembers whose token lies in which cell: no torch, no model."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from knnlm_server.errors import QueueFull
from knnlm_server.prefix_blocks import PrefixBlocks
from knnlm_server.queue_shares import RESERVED
from knnlm_server.scheduler import RowGroup, Scheduler, Sequence
from knnlm_server.sequence import Limits

FRESH = itertools.count()


BLOCK = 4


class Asked(Sequence):
    """A sequence that ends after so many tokens."""

    max_new_tokens = 1


class FakeRows:
    """Cells that hold token numbers and for whom they were computed, and a pool of blocks of them.

    Tokens are unique but for the beginnings that prompts share, so a cell tells whose it is.
    """

    def __init__(self, rows: int, blocks: int = 0) -> None:
        self.cells: list[list[tuple[int, str | None]]] = [[] for _ in range(rows)]
        self.block_tokens, self.kept_tokens = BLOCK if blocks else 0, BLOCK * blocks
        self._blocks = PrefixBlocks(blocks, BLOCK)
        self._pool: list[list[tuple[int, str | None]]] = [[] for _ in range(blocks)]

    def swap(self, first: int, second: int, length: int) -> None:
        assert first != second, "a swap with itself is work for nothing"
        assert max(len(self.cells[first]), len(self.cells[second])) <= length, "tokens beyond the length stay behind"
        self.cells[first], self.cells[second] = self.cells[second], self.cells[first]

    def clear(self, row: int, length: int) -> None:
        assert len(self.cells[row]) <= length, "tokens beyond the length are left over"
        self.cells[row] = []

    def reuse(self, row: int, computed: int, tokens: list[int], tenant: str) -> int:
        assert len(self.cells[row]) == computed
        found = [cell for place in self._blocks.find(tokens[:-1], tenant) for cell in self._pool[place]]
        self.cells[row] += found[computed:]
        return max(computed, len(found))

    def keep(self, row: int, tokens: list[int], tenant: str) -> None:
        assert [token for token, _ in self.cells[row]] == tokens, "only what is computed can be kept"
        known, places = self._blocks.add(tokens, tenant)
        for number, place in enumerate(places, start=known):
            self._pool[place] = self.cells[row][number * BLOCK : (number + 1) * BLOCK]


def sequence(prompt: int | list[int], max_new_tokens: int = 1, tenant: str | None = None, sample: int = 0) -> Asked:
    tokens = [next(FRESH) for _ in range(prompt)] if isinstance(prompt, int) else prompt
    made = Asked(str(next(FRESH)), tuple(tokens), tenant, sample=sample)
    made.max_new_tokens = max_new_tokens
    return made


def limits(**given: int) -> Limits:
    return Limits(context=1000, **given)


def compute(scheduler: Scheduler[Asked], rows: FakeRows, group: RowGroup[Asked]) -> list[Asked]:
    """What the engine does with a group: each row must hold its own sequence's tokens; then the new ones are written."""
    assert len(group.sequences) == len(group.counts) > 0
    for offset, (seq, count) in enumerate(zip(group.sequences, group.counts, strict=True)):
        cells = rows.cells[group.start + offset]
        assert [token for token, _ in cells] == seq.tokens[: seq.computed], "a row holds another sequence's tokens"
        assert all(tenant == seq.tenant for _, tenant in cells), "a row holds what was computed for another tenant"
        assert 1 <= count <= seq.remaining
        cells += [(token, seq.tenant) for token in seq.tokens[seq.computed : seq.computed + count]]
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


def most_steps(sequences: list[Asked], step_tokens: int, slots: int) -> int:
    """Steps after which the youngest of ``sequences`` is done, if prompts are read in the order of arrival."""
    budget = max(1, step_tokens - slots)
    reading = sum(math.ceil(max(0, len(s.prompt) - s.computed) / budget) + 1 for s in sequences)
    return reading + sequences[-1].max_new_tokens


PLENTY = 10_000


class SchedulerMachine(RuleBasedStateMachine):
    """Arrivals of one or several samples, for several tenants, with beginnings in common; steps, cancellations and timeouts."""

    @initialize(
        slots=st.integers(1, 5), step_tokens=st.integers(1, 12), queue=st.integers(1, 10), queue_tokens=st.integers(1, 60),
        blocks=st.sampled_from([0, 1, 3, PLENTY, PLENTY]),
    )  # fmt: skip
    def set_up(self, slots: int, step_tokens: int, queue: int, queue_tokens: int, blocks: int) -> None:
        self.limits = limits(max_concurrent=slots, max_waiting_requests=queue, max_waiting_tokens=queue_tokens)
        self.rows, self.step_tokens, self.blocks = FakeRows(slots, blocks), step_tokens, blocks
        self.scheduler: Scheduler[Asked] = Scheduler(self.rows, self.limits, step_tokens)
        self.arrived: list[Asked] = []  # of those that are not done, in order of arrival
        self.deadlines: dict[Asked, int] = {}  # from admission on
        self.read: set[tuple[str | None, tuple[int, ...]]] = set()  # beginnings of prompts whose last block was computed
        self.texts = [[next(FRESH) for _ in range(30)] for _ in range(2)]
        self.steps = 0

    @rule(
        shared=st.tuples(st.integers(0, 1), st.sampled_from([0, 0, 3, 5, 8, 14, 22, 30])), own=st.integers(0, 10),
        new_tokens=st.integers(1, 6), tenant=st.sampled_from(["a", "a", "b", None]), samples=st.sampled_from([1, 1, 1, 2, 3]),
    )  # fmt: skip
    def arrive(self, shared: tuple[int, int], own: int, new_tokens: int, tenant: str | None, samples: int) -> None:
        before = list(self.scheduler.waiting)
        waiting = {s.request_id: len(s.prompt) for s in before}
        prompt = self.texts[shared[0]][: shared[1]] + [next(FRESH) for _ in range(own or not shared[1])]
        newcomers = [sequence(prompt, new_tokens, tenant, sample) for sample in range(samples)]
        for newcomer in newcomers:
            newcomer.request_id = newcomers[0].request_id
        reasons = self._reasons_to_refuse(waiting, len(prompt))
        if tenant is not None:  # of a queue, one in eight places is for others
            own = {s.request_id: len(s.prompt) for s in before if s.tenant == tenant}
            reasons += self._reasons_to_refuse(own, len(prompt), RESERVED)
        if reasons:
            with pytest.raises(QueueFull) as caught:
                self.scheduler.add(newcomers)
            assert any(all(str(number) in str(caught.value) for number in numbers) for numbers in reasons)
            assert self.scheduler.waiting == before
        else:
            self.scheduler.add(newcomers)
            self.arrived += newcomers

    def _reasons_to_refuse(self, waiting: dict[str, int], length: int, reserved: int | None = None) -> list[tuple[int, int]]:
        """Pairs of what there is or would be and what is allowed, of a queue of which one part in so many is ``reserved``."""
        requests, tokens = (
            bound - (bound // reserved if reserved else 0) for bound in (self.limits.max_waiting_requests, self.limits.max_waiting_tokens)
        )
        total = sum(waiting.values()) + length
        too_many = [(len(waiting), requests)] if len(waiting) >= requests else []
        return too_many + ([(total, tokens)] if waiting and total > tokens else [])

    @rule(times=st.integers(1, 4))
    def steps_pass(self, times: int) -> None:
        for _ in range(times):
            self._one_step()

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        leaving = data.draw(st.sampled_from(range(len(self.arrived))))
        self.scheduler.finish(self.arrived.pop(leaving))

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def run_out_of_time(self, data: st.DataObject) -> None:
        late = data.draw(st.lists(st.sampled_from(self.arrived), max_size=3, unique_by=id))
        for seq in late:
            seq.deadline = 10.0
        assert self.scheduler.expired(9.9) == []
        assert set(self.scheduler.expired(10.0)) == set(late)
        for seq in late:
            self.scheduler.finish(seq)
            self.arrived.remove(seq)

    def _one_step(self) -> None:
        before = list(self.scheduler.running)
        groups = self.scheduler.schedule()
        admitted = [s for s in self.scheduler.running if s not in before]
        self._check_admission(before, admitted)
        decoding = [s for s in self.scheduler.running if s.computed >= len(s.prompt)]
        prompts = [s for s in self.arrived if s in self.scheduler.running and s not in decoding]
        counts = dict(zip((s for g in groups for s in g.sequences), (c for g in groups for c in g.counts), strict=True))
        assert len(counts) == sum(len(g.counts) for g in groups), "a sequence is served twice in one step"
        assert all(counts[s] == 1 for s in decoding), "every decoding row brings one token"
        assert sum(counts.values()) <= max(self.step_tokens, len(decoding) + 1)
        if prompts:
            assert prompts[0] in counts, "the prompt that waits longest is not read"
            read = groups[-1]
            assert len(read.counts) == 1 or max(read.counts) * len(read.counts) <= 2 * self.step_tokens, "mostly padding"
        self._check_nothing_is_read_twice(counts)
        for group in groups:
            for seq in compute(self.scheduler, self.rows, group):
                seq.tokens.append(next(FRESH))
        self.steps += 1
        for seq in list(self.scheduler.running):
            if seq.generated == seq.max_new_tokens:
                self.scheduler.finish(seq)
                self.arrived.remove(seq)
            else:
                assert self.steps <= self.deadlines[seq], "an admitted sequence starves"

    def _check_admission(self, before: list[Asked], admitted: list[Asked]) -> None:
        candidates = [s for s in self.arrived if s not in before]
        assert len(before) + len(admitted) == min(len(self.arrived), self.limits.max_concurrent), "a free row and a waiting request"
        rows = Counter(s.tenant for s in self.scheduler.running)
        for tenant in ("a", "b", None):
            own = [s for s in candidates if s.tenant == tenant]
            new = {s for s in admitted if s.tenant == tenant}
            assert new == set(own[: len(new)]), "a younger request of a tenant passes an older one"
            if len(own) > len(new):
                assert all(rows[s.tenant] <= rows[tenant] + 1 for s in admitted), "a tenant gets more than its share"
        for seq in admitted:
            older = self.arrived[: self.arrived.index(seq) + 1]
            self.deadlines[seq] = self.steps + most_steps(older, self.step_tokens, self.limits.max_concurrent)

    def _check_nothing_is_read_twice(self, counts: dict[Asked, int]) -> None:
        """With room for all, no block of a tenant's prompts is computed again (but for a prompt's last token)."""
        for seq, count in counts.items():
            for end in range(BLOCK, len(seq.prompt), BLOCK):
                if self.blocks == PLENTY and seq.tenant is not None and seq.computed < end <= seq.computed + count:
                    beginning = seq.tenant, seq.prompt[:end]
                    assert beginning not in self.read, "a prompt's beginning is computed a second time"
                    self.read.add(beginning)

    @invariant()
    def rows_are_in_order(self) -> None:
        running = self.scheduler.running
        assert len(running) <= self.limits.max_concurrent
        for row, cells in enumerate(self.rows.cells):
            expected = running[row].tokens[: running[row].computed] if row < len(running) else []
            assert [token for token, _ in cells] == expected
        reading = [s.computed < len(s.prompt) for s in running]
        assert reading == sorted(reading), "a prompt lies before a decoding row"

    @invariant()
    def nothing_is_lost(self) -> None:
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert len(known) == len(self.arrived)
        assert set(known) == set(self.arrived)
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
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=slots), step_tokens)
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
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=4), step_tokens=10)
    short, other, long = sequence(4), sequence(3), sequence(20)
    for seq in (short, other, long):
        scheduler.add([seq])
    (group,) = scheduler.schedule()
    assert group.start == 0
    assert group.counts == [4, 3, 3]


def test_rows_that_would_mostly_be_padding_wait_for_the_next_step() -> None:
    rows = FakeRows(4)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=4), step_tokens=12)
    for seq in (sequence(9), sequence(1), sequence(1), sequence(1)):
        scheduler.add([seq])
    (group,) = scheduler.schedule()
    assert group.counts == [9, 1], "three rows as wide as 9 would be 27 cells for 11 tokens"


def test_all_rows_decode_even_where_they_are_more_than_the_budget() -> None:
    rows = FakeRows(4)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=4), step_tokens=2)
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
    scheduler: Scheduler[Asked] = Scheduler(FakeRows(1), limits(max_concurrent=1, max_waiting_tokens=10), step_tokens=4)
    scheduler.add([sequence(50)])
    with pytest.raises(QueueFull, match="51 prompt tokens would be waiting, the limit is 10"):
        scheduler.add([sequence(1)])


def test_the_queue_counts_requests_and_says_so() -> None:
    scheduler: Scheduler[Asked] = Scheduler(FakeRows(1), limits(max_concurrent=1, max_waiting_requests=2), step_tokens=4)
    for _ in range(2):
        scheduler.add([sequence(1)])
    with pytest.raises(QueueFull, match="2 requests are waiting, the limit is 2"):
        scheduler.add([sequence(1)])


def test_many_requests_of_one_tenant_delay_another_by_the_rows_that_run_and_no_more() -> None:
    rows = FakeRows(2)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=2), step_tokens=8)
    for _ in range(20):
        scheduler.add([sequence(2, 3, "greedy")])
    step(scheduler, rows)
    modest = sequence(2, 3, "modest")
    scheduler.add([modest])
    for _ in range(3):
        step(scheduler, rows)
    assert modest in scheduler.running


def test_a_tenant_leaves_room_in_the_queue_for_others() -> None:
    scheduler: Scheduler[Asked] = Scheduler(
        FakeRows(1), limits(max_concurrent=1, max_waiting_requests=8, max_waiting_tokens=80), step_tokens=4
    )
    for _ in range(7):
        scheduler.add([sequence(1, tenant="greedy")])
    with pytest.raises(QueueFull, match="7 requests of 'greedy' are waiting, the limit for one caller is 7"):
        scheduler.add([sequence(1, tenant="greedy")])
    scheduler.add([sequence(1, tenant="modest")])
    with pytest.raises(QueueFull, match="8 requests are waiting, the limit is 8"):
        scheduler.add([sequence(1, tenant="third")])


def test_a_tenant_leaves_room_for_the_tokens_of_others() -> None:
    scheduler: Scheduler[Asked] = Scheduler(FakeRows(1), limits(max_concurrent=1, max_waiting_tokens=80), step_tokens=4)
    scheduler.add([sequence(50, tenant="greedy")])
    with pytest.raises(QueueFull, match="71 prompt tokens of 'greedy' would be waiting, the limit for one caller is 70"):
        scheduler.add([sequence(21, tenant="greedy")])
    scheduler.add([sequence(20, tenant="greedy")])
    scheduler.add([sequence(10, tenant="modest")])


def test_samples_of_a_request_count_their_prompt_once() -> None:
    scheduler: Scheduler[Asked] = Scheduler(
        FakeRows(1), limits(max_concurrent=1, max_waiting_requests=2, max_waiting_tokens=25), step_tokens=4
    )
    for _ in range(2):
        first = sequence(10)
        others = [sequence(list(first.prompt), sample=sample) for sample in range(1, 8)]
        for other in others:
            other.request_id = first.request_id
        scheduler.add([first, *others])
    assert len(scheduler.waiting) == 16
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        scheduler.add([sequence(1)])


def test_a_prompt_waits_for_the_beginning_that_an_older_one_reads_and_takes_it_over() -> None:
    rows = FakeRows(3, blocks=PLENTY)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=3), step_tokens=10)
    first = sequence(18, tenant="a")
    same = sequence([*first.prompt[:16], next(FRESH)], tenant="a")
    foreign = sequence(list(first.prompt), tenant="b")
    for seq in (first, same, foreign):
        scheduler.add([seq])
    assert step(scheduler, rows) == []
    assert (first.computed, same.computed, foreign.computed) == (10, 0, 0), "it waits, and the budget is the older one's"
    step(scheduler, rows)
    assert (same.computed, foreign.computed) == (0, 2), "what the older one left of the budget goes to the one that shares nothing"
    assert step(scheduler, rows) == [same]
    assert (same.reused, foreign.reused) == (16, 0)


def test_a_prompt_waits_for_no_more_than_is_kept() -> None:
    rows = FakeRows(2, blocks=1)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=2), step_tokens=6)
    first = sequence(18, tenant="a")
    same = sequence([*first.prompt[:16], next(FRESH)], tenant="a")
    scheduler.add([first])
    scheduler.add([same])
    step(scheduler, rows)
    assert (first.computed, same.computed) == (6, 0)
    scheduler.schedule()
    assert (same.leader, same.reused) == (None, 4), "the one block that is kept is taken over, and the rest is nothing to wait for"


def test_a_prompt_whose_leader_is_cancelled_goes_on_from_what_it_left() -> None:
    rows = FakeRows(2, blocks=PLENTY)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=2), step_tokens=9)
    first = sequence(40, tenant="a")
    second = sequence(list(first.prompt), tenant="a")
    scheduler.add([first])
    scheduler.add([second])
    step(scheduler, rows)
    scheduler.finish(first)
    step(scheduler, rows)
    assert (second.reused, second.computed) == (8, 17)


def test_what_a_completion_said_is_kept_for_the_next_prompt() -> None:
    rows = FakeRows(1, blocks=PLENTY)
    scheduler: Scheduler[Asked] = Scheduler(rows, limits(max_concurrent=1), step_tokens=20)
    first = sequence(6, 9, tenant="a")
    scheduler.add([first])
    while not scheduler.idle:
        step(scheduler, rows)
    again = sequence([*first.tokens, next(FRESH)], tenant="a")
    scheduler.add([again])
    step(scheduler, rows)
    assert again.reused == 12, "14 of its 15 tokens were computed, three blocks of 4"


def test_importing_the_scheduler_imports_neither_torch_nor_grpc() -> None:
    code = "import sys, knnlm_server.scheduler; print([m for m in ('torch', 'transformers', 'faiss', 'grpc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
