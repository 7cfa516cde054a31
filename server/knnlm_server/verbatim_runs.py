"""Runs of a completion's tokens that stand in a document just so, followed while the completion grows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knnlm.datastore.reader import Datastore

Ints = np.ndarray[Any, np.dtype[np.int64]]

_CLOSED_RUNS = 4096


@dataclass(frozen=True)
class Run:
    """``tokens`` tokens of a completion from number ``start`` on, which stand from ``position`` of the datastore's token
    stream on, in its document number ``document``."""

    start: int
    tokens: int
    position: int
    document: int


class VerbatimRuns:
    """The runs in one datastore that hold a token for which one of its entries voted.

    A run goes on while completion and document do, in both directions, and never beyond the document. Memory is bounded
    by the runs that still go on and the documents of those that ended.
    """

    def __init__(self, store: Datastore) -> None:
        self._store = store
        nothing = np.zeros(0, np.int64)
        # Of runs that still go on: number of the first token, stream position less number of a token, and document.
        self._starts, self._offsets, self._documents = nothing, nothing, nothing
        self._closed = np.zeros((0, 4), np.int64)
        self._length = 0

    def add(self, completion: Sequence[int], entries: Ints) -> None:
        """Take the newest token of ``completion`` (all of its tokens), for which ``entries`` [m] voted."""
        newest = len(completion) - 1
        goes_on = self._same(self._offsets + newest, self._documents, completion[newest])
        self._close(~goes_on)
        self._length = len(completion)
        documents = self._store.documents.of_entries(entries)
        offsets = entries + documents + 1 - newest
        new = ~np.isin(offsets, self._offsets)
        offsets, documents = offsets[new], documents[new]
        self._starts = np.concatenate([self._starts, self._first_tokens(completion, offsets, documents)])
        self._offsets = np.concatenate([self._offsets, offsets])
        self._documents = np.concatenate([self._documents, documents])

    def longest(self) -> Run | None:
        """The longest one; of equal ones the earliest in the completion, then in the datastore. Documents that are removed have none."""
        runs = np.concatenate([self._closed, self._runs(np.ones(len(self._starts), bool))])
        runs = runs[~np.isin(runs[:, 3], self._store.tombstones.documents)]
        if len(runs) == 0:
            return None
        start, tokens, position, document = runs[np.lexsort((runs[:, 2], runs[:, 0], -runs[:, 1]))[0]].tolist()
        return Run(start, tokens, position, document)

    def _same(self, positions: Ints, documents: Ints, token: int | Ints) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether a position lies in the document and holds the token: [m]."""
        table = self._store.documents
        first = table.token_starts[documents]
        inside = (positions >= first) & (positions < first + table.token_counts[documents])
        found = self._store.tokens.gather(torch.from_numpy(np.where(inside, positions, first))).numpy()
        return np.asarray(inside & (found == token))

    def _first_tokens(self, completion: Sequence[int], offsets: Ints, documents: Ints) -> Ints:
        """Number of the first token of each run that holds the newest one, found by going back: [m]."""
        tokens = np.asarray(completion, np.int64)
        starts = np.full(len(offsets), len(tokens) - 1)
        going = np.arange(len(offsets))
        while len(going := going[starts[going] > 0]):
            before = starts[going] - 1
            going = going[self._same(offsets[going] + before, documents[going], tokens[before])]
            starts[going] -= 1
        return starts

    def _runs(self, which: np.ndarray[Any, np.dtype[np.bool_]]) -> Ints:
        """Start, tokens, position and document of open runs: [m, 4]."""
        starts, offsets = self._starts[which], self._offsets[which]
        return np.stack([starts, self._length - starts, offsets + starts, self._documents[which]], axis=1)

    def _close(self, ended: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        self._closed = np.concatenate([self._closed, self._runs(ended)])
        self._starts, self._offsets, self._documents = (part[~ended] for part in (self._starts, self._offsets, self._documents))
        if len(self._closed) > _CLOSED_RUNS:
            runs = self._closed[np.lexsort((self._closed[:, 2], self._closed[:, 0], -self._closed[:, 1]))]
            self._closed = runs[np.unique(runs[:, 3], return_index=True)[1]]
