"""What runs next, under explicit budgets. Knows rows and tokens by number; no torch, no gRPC, no text.

Running sequences lie in rows 0..n-1 of the cache without gaps: first those that decode (one new token a step), then
those whose prompt is still being read. So each group is one contiguous range of rows, and no step copies the cache.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from knnlm_server.errors import QueueFull
from knnlm_server.queue_shares import share_of
from knnlm_server.sequence import Limits

STEP_TOKENS = 512
S = TypeVar("S", bound="Sequence")


class Rows(Protocol):
    """The cache, as far as scheduling moves its rows. ``length``: tokens of the row that hold something."""

    @property
    def block_tokens(self) -> int:
        """Tokens of the blocks in which beginnings of texts are kept for others; 0 where none are."""

    @property
    def kept_tokens(self) -> int:
        """Most tokens of one text that there is room to keep: what is beyond them, nobody can take over."""

    def reuse(self, row: int, computed: int, tokens: list[int], tenant: str) -> int:
        """Copy what is kept of a text into a row that holds its first ``computed`` tokens; how many it holds then.

        Always less than all: the last token has to be computed.
        """

    def keep(self, row: int, tokens: list[int], tenant: str) -> None:
        """Keep the full blocks of a text, all of which the row holds."""

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange two rows; neither holds more than ``length`` tokens."""

    def clear(self, row: int, length: int) -> None:
        """Empty a row."""


@dataclass(eq=False)
class Sequence:
    """Tokens on their way through the model: ``tokens`` = prompt and completion, of which the first ``computed`` are in the cache.

    ``tenant``: whose it is (None: it shares computed prefixes with nobody). ``deadline``: when its time is over, in seconds of
    the engine's clock. ``sample``: which one of its request's sequences. ``arrival``: its number in the order of arrival, given
    by the scheduler. ``reused``: tokens of its prompt that were not computed again. ``started``: whether its reading was told of.
    ``leader``: an older one whose first ``shared`` tokens are its own too, and which is just being read. Equal to itself alone.
    """

    request_id: str
    prompt: tuple[int, ...]
    tenant: str | None = None
    deadline: float = math.inf
    sample: int = 0
    tokens: list[int] = field(init=False)
    computed: int = field(default=0, init=False)
    arrival: int = field(default=0, init=False)
    reused: int = field(default=0, init=False)
    started: bool = field(default=False, init=False)
    leader: Sequence | None = field(default=None, init=False)
    shared: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the completion so far."""
        return len(self.tokens) - len(self.prompt)


@dataclass(frozen=True)
class RowGroup(Generic[S]):
    """Rows [start, start + len(counts)) of the cache, and how many new tokens each brings."""

    start: int
    sequences: list[S]
    counts: list[int]

    def halves(self) -> list[RowGroup[S]]:
        """Decoding rows in two groups; prompts, and a row alone, as they are."""
        middle = len(self.sequences) // 2
        if middle == 0 or not all(sequence.generated for sequence in self.sequences):
            return [self]
        return [
            RowGroup(self.start, self.sequences[:middle], self.counts[:middle]),
            RowGroup(self.start + middle, self.sequences[middle:], self.counts[middle:]),
        ]


class Scheduler(Generic[S]):
    """Admits sequences by arrival and says which rows bring how many tokens in the next step."""

    def __init__(self, rows: Rows, limits: Limits, step_tokens: int = STEP_TOKENS) -> None:
        self._rows, self._limits, self._step_tokens = rows, limits, step_tokens
        self.waiting: list[S] = []
        self.running: list[S] = []
        self._decoding = 0
        self._arrivals = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    @property
    def waiting_requests(self) -> dict[str, int]:
        """Prompt tokens of each request of which a sequence waits; samples of one request share theirs."""
        return {sequence.request_id: len(sequence.prompt) for sequence in self.waiting}

    def add(self, sequences: Iterable[S]) -> None:
        """Put the sequences of one request at the queue's end; raises :class:`QueueFull` with the numbers.

        A tenant can't fill all of the queue.
        """
        limits, sequences, waiting = self._limits, list(sequences), self.waiting_requests
        tokens = sum(waiting.values()) + len(sequences[0].prompt)
        self._check_share(sequences[0])
        if len(waiting) >= limits.max_waiting_requests:
            raise QueueFull(f"{len(waiting)} requests are waiting, the limit is {limits.max_waiting_requests}; try again later.")
        if waiting and tokens > limits.max_waiting_tokens:
            raise QueueFull(f"{tokens} prompt tokens would be waiting, the limit is {limits.max_waiting_tokens}; try again later.")
        for sequence in sequences:
            sequence.arrival = next(self._arrivals)
        self.waiting += sequences

    def _check_share(self, sequence: S) -> None:
        tenant, limits = sequence.tenant, self._limits
        own = {other.request_id: len(other.prompt) for other in self.waiting if other.tenant == tenant}
        most = share_of(limits.max_waiting_requests, tenant)
        if tenant and len(own) >= most:
            raise QueueFull(f"{len(own)} requests of {tenant!r} are waiting, the limit for one caller is {most}; try again later.")
        tokens, most = sum(own.values()) + len(sequence.prompt), share_of(limits.max_waiting_tokens, tenant)
        if tenant and own and tokens > most:
            raise QueueFull(f"{tokens} prompt tokens of {tenant!r} would be waiting, the limit for one caller is {most}; try again later.")

    def expired(self, now: float) -> list[S]:
        """Sequences whose time is over, wherever they are."""
        return [sequence for sequence in (*self.running, *self.waiting) if sequence.deadline <= now]

    def schedule(self) -> list[RowGroup[S]]:
        """The groups of the next step: all decoding rows, and prompts in chunks up to the budget of tokens."""
        while self.waiting and len(self.running) < self._limits.max_concurrent:
            self._admit(self._next())
        groups = []
        if self._decoding:
            decoding = self.running[: self._decoding]
            groups.append(RowGroup(0, decoding, [1] * len(decoding)))
        if len(self.running) > self._decoding:
            groups.append(self._prompts())
        return groups

    def computed(self, group: RowGroup[S]) -> None:
        """Note that a group's tokens are in the cache; rows whose prompt is read go over to decoding."""
        for sequence, count in zip(group.sequences, group.counts, strict=True):
            sequence.computed += count
            if not sequence.generated:
                self._keep(sequence, sequence.computed - count)
                if not sequence.remaining:
                    self._promote(self.running.index(sequence))

    def finish(self, sequence: S) -> None:
        """Take a sequence out, wherever it is; its row is filled by the last of its group, that one by the last of all."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        if sequence.generated:
            self._keep(sequence, len(sequence.prompt))
        hole = self.running.index(sequence)
        if hole < self._decoding:
            self._decoding -= 1
            self._exchange(hole, self._decoding)
            hole = self._decoding
        self._exchange(hole, len(self.running) - 1)
        self.running.pop()
        self._rows.clear(len(self.running), sequence.computed)

    def _next(self) -> S:
        """Who gets the free row: the oldest of the tenant that has the fewest, so that many requests of one delay no other."""
        rows = Counter(sequence.tenant for sequence in self.running)
        return min(self.waiting, key=lambda sequence: (rows[sequence.tenant], sequence.arrival))

    def _admit(self, sequence: S) -> None:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        self._reuse(sequence)
        self._follow(sequence)

    def _prompts(self) -> RowGroup[S]:
        """The oldest prompts first, whichever rows they got."""
        budget = max(1, self._step_tokens - self._decoding)
        sequences: list[S] = []
        counts: list[int] = []
        reading = [sequence for sequence in self.running[self._decoding :] if not self._held(sequence)]
        for sequence in sorted(reading, key=lambda sequence: sequence.arrival):
            count = min(sequence.remaining, budget - sum(counts))
            # Rows of a step are as wide as the widest; a row that would mostly add padding waits for the next step.
            padded = max([*counts, count]) * (len(counts) + 1)
            if count <= 0 or (counts and padded > 2 * self._step_tokens):
                break
            self._exchange(self._decoding + len(sequences), self.running.index(sequence))
            sequences.append(sequence)
            counts.append(count)
        return RowGroup(self._decoding, sequences, counts)

    def _reuse(self, sequence: S) -> None:
        if self._rows.block_tokens and sequence.tenant is not None:
            before = sequence.computed
            sequence.computed = self._rows.reuse(self.running.index(sequence), before, sequence.tokens, sequence.tenant)
            sequence.reused += sequence.computed - before

    def _keep(self, sequence: S, before: int) -> None:
        """Keep what a row holds for others, where that is a block more than its first ``before`` tokens."""
        block = self._rows.block_tokens
        if block and sequence.tenant is not None and sequence.computed // block > before // block:
            self._rows.keep(self.running.index(sequence), sequence.tokens[: sequence.computed], sequence.tenant)

    def _follow(self, sequence: S) -> None:
        """Find the prompt in reading that shares most with this one, and more than is computed of it.

        Only older ones are followed, so the oldest always goes on, and nobody waits longer than it would for them anyway.
        """
        sequence.leader, sequence.shared = None, sequence.computed
        for other in self.running[self._decoding :]:
            if other.arrival < sequence.arrival and other.tenant == sequence.tenant is not None:
                shared = self._in_common(sequence, other)
                if shared > max(sequence.shared, other.computed):
                    sequence.leader, sequence.shared = other, shared

    def _held(self, sequence: S) -> bool:
        """Whether a prompt waits for its leader to be read as far as they are the same."""
        leader = sequence.leader
        if leader is None:
            return False
        if leader in self.running and leader.computed < sequence.shared:
            return True
        self._reuse(sequence)
        self._follow(sequence)
        return sequence.leader is not None

    def _in_common(self, sequence: S, other: S) -> int:
        """Tokens of the full blocks that two prompts begin with alike and that are kept, the last token of the first left out."""
        block, end = self._rows.block_tokens, 0
        most = min(len(sequence.prompt) - 1, len(other.prompt), self._rows.kept_tokens)
        while block and end + block <= most and sequence.prompt[end : end + block] == other.prompt[end : end + block]:
            end += block
        return end

    def _promote(self, row: int) -> None:
        self._exchange(self._decoding, row)
        self._decoding += 1

    def _exchange(self, first: int, second: int) -> None:
        """Swap two sequences with their rows."""
        if first != second:
            a, b = self.running[first], self.running[second]
            self._rows.swap(first, second, max(a.computed, b.computed))
            self.running[first], self.running[second] = b, a
