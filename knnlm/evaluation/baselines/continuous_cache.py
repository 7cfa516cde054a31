"""A continuous cache (Grave, Joulin & Usunier, 2017): the text's own last tokens as a small datastore, without any search.

p_cache(w | h_t) is the sum of softmax_i(θ h_t·h_i) over the last N positions i of the same document after which w came; h
are the base LM's keys, as a datastore holds them. The queries of the pass that scored the LM serve: nothing is read twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from knnlm.errors import InvalidInput
from knnlm.evaluation.scoring import ReadBatch
from knnlm.mixture import Mixture
from knnlm.tokenized import TokenizedDocument

DEFAULT_SIZE = 2000
ROWS_AT_ONCE = 512

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class CacheSettings:
    """``size``: N, how many tokens back it reaches; ``flatness``: θ, above 0 (the larger, the more the nearest decide)."""

    size: int
    flatness: float

    @classmethod
    def of(cls, mixture: Mixture) -> CacheSettings:
        """The last 2,000 tokens, and θ = 2/T of a datastore's mixture: over keys of equal length softmax(-d/T) is the same."""
        return cls(DEFAULT_SIZE, 2 / mixture.temperature)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InvalidInput("cache size", f"is {self.size}, but must be at least 1.")
        if not 0 < self.flatness < float("inf"):
            raise InvalidInput("cache flatness", f"is {self.flatness}, but must be a number above 0.")


class QueryTape:
    """The queries of a text in the order of its tokens, in a temporary file: 4 bytes x dimension for each token.

    Batches come in any order; each row once. A context manager: the file is gone with it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        self.dimension = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def record(self, batch: ReadBatch) -> None:
        """Keep the queries of one batch. Raises :class:`OSError` where the disk is full."""
        rows, queries = batch.rows.numpy(), np.ascontiguousarray(batch.queries.numpy(), np.float32)
        self.dimension = queries.shape[1]
        # The rows of a window follow one another.
        runs = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1)
        for first, last in zip(runs, [*runs[1:], len(rows)], strict=True):
            self._file.seek(int(rows[first]) * self.dimension * 4)
            self._file.write(queries[first:last].data)

    def rows(self, start: int, stop: int) -> Tensor:
        """Queries of rows [start, stop): [rows, dimension] float32."""
        self._file.seek(start * self.dimension * 4)
        content = bytearray(self._file.read((stop - start) * self.dimension * 4))
        return torch.frombuffer(content, dtype=torch.float32).view(stop - start, self.dimension)


def cache_log_probs(tape: QueryTape, documents: Sequence[TokenizedDocument], settings: CacheSettings) -> Floats:
    """log p_cache of token 1, 2, … of each document: [tokens] float32, in the order of ``compare``; -inf where the cache does
    not hold the token, NaN where it is empty (token 1). ``tape`` holds the queries of these documents."""
    parts = []
    row = 0
    for document in documents:
        targets = torch.from_numpy(document.ids[1:].astype(np.int64))
        parts += [part.numpy() for part in _document(tape, row, targets, settings)]
        row += len(targets)
    return np.concatenate([np.zeros(0, np.float32), *parts])


def _document(tape: QueryTape, row: int, targets: Tensor, settings: CacheSettings) -> Iterator[Tensor]:
    """Piece by piece: log p_cache of the ``targets`` of one document, whose first query is row ``row`` of the tape."""
    for start in range(0, len(targets), ROWS_AT_ONCE):
        stop, first = min(start + ROWS_AT_ONCE, len(targets)), max(0, start - settings.size)
        keys = tape.rows(row + first, row + stop)
        scores = settings.flatness * (keys[start - first :] @ keys.T)
        back = torch.arange(start, stop)[:, None] - torch.arange(first, stop)
        scores[(back < 1) | (back > settings.size)] = -torch.inf
        matched = torch.where(targets[start:stop, None] == targets[first:stop], scores, -torch.inf)
        # Both are -inf where the cache is empty, which gives NaN.
        yield (matched.logsumexp(1) - scores.logsumexp(1))
