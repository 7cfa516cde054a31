"""What runs next, under explicit budgets. Knows rows and tokens by number; no torch, no gRPC, no text.

Running sequences lie in rows 0..n-1 of the cache without gaps: first those that decode (one new token a step), then
those whose prompt is still being read. So each group is one contiguous range of rows, and no step copies the cache.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from knnlm_server.errors import QueueFull
from knnlm_server.sequence import GenerationRequest, Limits

STEP_TOKENS = 512


class Rows(Protocol):
    """The cache, as far as scheduling moves its rows. ``length``: tokens of the row that hold something."""

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange two rows; neither holds more than ``length`` tokens."""

    def clear(self, row: int, length: int) -> None:
        """Empty a row."""


@dataclass
class Sequence:
    """One request on its way: ``tokens`` = prompt and completion, of which the first ``computed`` are in the cache.

    ``arrival``: its number in the order of arrival, given by the scheduler.
    """

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    arrival: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        """Tokens of the completion so far."""
        return len(self.tokens) - len(self.request.prompt)


@dataclass(frozen=True)
class RowGroup:
    """Rows [start, start + len(counts)) of the cache, and how many new tokens each brings."""

    start: int
    sequences: list[Sequence]
    counts: list[int]


class Scheduler:
    """Admits sequences by arrival and says which rows bring how many tokens in the next step."""

    def __init__(self, rows: Rows, limits: Limits, step_tokens: int = STEP_TOKENS) -> None:
        self._rows, self._limits, self._step_tokens = rows, limits, step_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._decoding = 0
        self._arrivals = itertools.count()

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        return not self.waiting and not self.running

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the queue's end; raises :class:`QueueFull` with the numbers."""
        limits = self._limits
        tokens = sum(len(s.tokens) for s in self.waiting) + len(sequence.tokens)
        if len(self.waiting) >= limits.max_waiting_requests:
            raise QueueFull(f"{len(self.waiting)} requests are waiting, the limit is {limits.max_waiting_requests}; try again later.")
        if self.waiting and tokens > limits.max_waiting_tokens:
            raise QueueFull(f"{tokens} prompt tokens would be waiting, the limit is {limits.max_waiting_tokens}; try again later.")
        sequence.arrival = next(self._arrivals)
        self.waiting.append(sequence)

    def schedule(self) -> list[RowGroup]:
        """The groups of the next step: all decoding rows, and prompts in chunks up to the budget of tokens."""
        while self.waiting and len(self.running) < self._limits.max_concurrent:
            self.running.append(self.waiting.popleft())
        groups = []
        if self._decoding:
            decoding = self.running[: self._decoding]
            groups.append(RowGroup(0, decoding, [1] * len(decoding)))
        if len(self.running) > self._decoding:
            groups.append(self._prompts())
        return groups

    def computed(self, group: RowGroup) -> None:
        """Note that a group's tokens are in the cache; rows whose prompt is read go over to decoding."""
        for sequence, count in zip(group.sequences, group.counts, strict=True):
            sequence.computed += count
            row = self._row(sequence)
            if row >= self._decoding and not sequence.remaining:
                self._promote(row)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its row is filled by the last of its group, that one by the last of all."""
        waiting = next((i for i, other in enumerate(self.waiting) if other is sequence), None)
        if waiting is not None:
            del self.waiting[waiting]
            return
        hole = self._row(sequence)
        if hole < self._decoding:
            self._decoding -= 1
            self._exchange(hole, self._decoding)
            hole = self._decoding
        self._exchange(hole, len(self.running) - 1)
        self.running.pop()
        self._rows.clear(len(self.running), sequence.computed)

    def _prompts(self) -> RowGroup:
        # A row that was filled by the last one holds a prompt that came late: the oldest is read first, or it would starve.
        self._exchange(self._decoding, min(range(self._decoding, len(self.running)), key=lambda row: self.running[row].arrival))
        budget = max(1, self._step_tokens - self._decoding)
        sequences: list[Sequence] = []
        counts: list[int] = []
        for sequence in self.running[self._decoding :]:
            count = min(sequence.remaining, budget - sum(counts))
            # Rows of a step are as wide as the widest; a row that would mostly add padding waits for the next step.
            padded = max([*counts, count]) * (len(counts) + 1)
            if count <= 0 or (counts and padded > 2 * self._step_tokens):
                break
            sequences.append(sequence)
            counts.append(count)
        return RowGroup(self._decoding, sequences, counts)

    def _promote(self, row: int) -> None:
        self._exchange(self._decoding, row)
        self._decoding += 1

    def _exchange(self, first: int, second: int) -> None:
        """Swap two sequences with their rows."""
        if first != second:
            a, b = self.running[first], self.running[second]
            self._rows.swap(first, second, max(a.computed, b.computed))
            self.running[first], self.running[second] = b, a

    def _row(self, sequence: Sequence) -> int:
        return next(row for row, other in enumerate(self.running) if other is sequence)
