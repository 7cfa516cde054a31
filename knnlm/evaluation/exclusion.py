"""Documents of a datastore that a comparison must not find: those that are asked for, and those that are in the text itself.

A document of the text is in the datastore where one there has the very same tokens, whatever the ids say: ids are names
of files, which two corpora may share for different content, and a copy under another name leaks as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from knnlm.datastore.reader import Datastore
from knnlm.datastore.selection import named_rows
from knnlm.entry_mask import EntryMask
from knnlm.evaluation.comparison import Excluded, LongArray
from knnlm.evaluation.overlap import Tokens
from knnlm.knn_lm import KNNLanguageModel
from knnlm.retrieval import Retriever
from knnlm.tokenized import TokenizedDocument


@dataclass(frozen=True)
class Exclusion:
    """Documents of a datastore that are left out: their ``rows`` in its table, ascending, and what is said of each."""

    rows: LongArray
    documents: tuple[Excluded, ...]

    @classmethod
    def choose(cls, store: Datastore, text: Sequence[TokenizedDocument], ids: Sequence[str], *, automatic: bool) -> Exclusion:
        """Documents of these ``ids`` and, where ``automatic``, all that have the same tokens as a document of ``text``.

        Raises :class:`DocumentNotFound` for an id that no document has. Removed documents are found by no one anyway.
        """
        copies = copied_documents(store, text) if automatic else {}
        named = named_rows(store.documents, ids) if ids else np.zeros(0, np.int64)
        rows = np.setdiff1d(np.union1d(named, np.array(list(copies), np.int64)), store.tombstones.documents)
        asked = set(named.tolist())
        names, sources = (store.documents.texts(column, rows) for column in ("id", "source"))
        entries = (store.documents.token_counts[rows] - 1).tolist()
        test = [None if row in asked else copies[row] for row in rows.tolist()]
        return cls(rows, tuple(Excluded(*facts) for facts in zip(names, sources, entries, test, strict=True)))

    def apply(self, knn_lm: KNNLanguageModel, store: Datastore) -> KNNLanguageModel:
        """``knn_lm`` over ``store``, whose searches never find these documents."""
        if not len(self.rows):
            return knn_lm
        retriever = knn_lm.retriever
        assert isinstance(retriever, Retriever)
        gone = np.union1d(self.rows, store.tombstones.documents)
        mask = EntryMask.without(len(store), store.documents.entry_ranges(gone))
        narrowed = Retriever(retriever.index, store.keys, store.values, retriever.settings, lambda: mask)
        return KNNLanguageModel(knn_lm.model, knn_lm.tokenizer, narrowed, knn_lm.mixture, knn_lm.gate)

    def token_ranges(self, store: Datastore) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the token stream that are neither removed nor excluded, in order."""
        gone = np.union1d(self.rows, store.tombstones.documents)
        table = store.documents
        starts = [0, *(table.token_starts[gone] + table.token_counts[gone]).tolist()]
        stops = [*table.token_starts[gone].tolist(), len(store.tokens)]
        return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def copied_documents(store: Datastore, text: Sequence[TokenizedDocument]) -> dict[int, str]:
    """Rows of the datastore's documents whose tokens are those of a document of ``text``, with the id of that one."""
    by_content = {_digest(document.ids): document.document.id for document in reversed(text)}
    found = {row: _digest(_tokens(store, row)) for row in _likely(store, text).tolist()}
    return {row: by_content[digest] for row, digest in found.items() if digest in by_content}


def _likely(store: Datastore, text: Sequence[TokenizedDocument]) -> LongArray:
    """Rows of documents that are as long as one of ``text`` and have its first, middle and last token."""
    table = store.documents
    wanted = {(len(d.ids), *(int(d.ids[place]) for place in (0, len(d.ids) // 2, -1))) for d in text}
    rows = np.flatnonzero(np.isin(table.token_counts, [length for length, *_ in wanted]))
    starts, counts = table.token_starts[rows], table.token_counts[rows]
    seen = [store.tokens.gather(torch.from_numpy(starts + offset)).tolist() for offset in (0 * counts, counts // 2, counts - 1)]
    same = [signature in wanted for signature in zip(counts.tolist(), *seen, strict=True)]
    likely: LongArray = rows[np.array(same, bool)]
    return likely


def _tokens(store: Datastore, row: int) -> Tokens:
    start = int(store.documents.token_starts[row])
    return store.tokens.slice(start, start + int(store.documents.token_counts[row])).numpy()


def _digest(tokens: Tokens) -> bytes:
    return xxhash.xxh3_128_digest(np.ascontiguousarray(tokens, np.int32).tobytes())
