"""The leakage audit: does the text stand in the datastore? Then perplexity with retrieval says little of new text.

13 tokens is what Brown et al. (2020), appendix C, take for decontamination; 8 shows what is merely common, 32 what was copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.evaluation.comparison import BoolArray, DocumentOverlap, Overlap
from knnlm.evaluation.exclusion import Exclusion
from knnlm.evaluation.overlap import Layout, Matches, find_sequences
from knnlm.tokenized import TokenizedDocument

LENGTHS = (8, 13, 32)
AUDITED = 13
NAMED_DOCUMENTS = 10


@dataclass(frozen=True)
class Audit:
    """What stands in the datastore: ``overlaps`` by length of sequence, ``contaminated`` [scored tokens] bool, and the
    ``documents`` that share most, of ``overlapping`` that share any."""

    overlaps: tuple[Overlap, ...]
    contaminated: BoolArray
    documents: tuple[DocumentOverlap, ...]
    overlapping: int


def audit(store: Datastore, text: Sequence[TokenizedDocument], exclusion: Exclusion) -> Audit:
    """Look for the text's sequences of 8, 13 and 32 tokens in what searches can find of ``store``."""
    ids = [document.ids for document in text]
    layout = Layout(store.documents.token_starts, store.documents.token_counts)
    ranges = exclusion.token_ranges(store)
    matches = {length: find_sequences(ids, store.tokens, layout, ranges, length) for length in LENGTHS}
    audited = matches[AUDITED]
    return Audit(
        tuple(Overlap(m.length, m.sequences, int(m.found.sum())) for m in matches.values()),
        audited.covered()[_scored(ids)],
        _most_overlapping(store, audited),
        int((audited.in_documents > 0).sum()),
    )


def overlap_with(store: Datastore, text: Sequence[TokenizedDocument]) -> Overlap:
    """How many of the text's 13-token sequences searches can find in ``store``."""
    layout = Layout(store.documents.token_starts, store.documents.token_counts)
    ranges = Exclusion.choose(store, (), (), automatic=False).token_ranges(store)
    matches = find_sequences([document.ids for document in text], store.tokens, layout, ranges, AUDITED)
    return Overlap(AUDITED, matches.sequences, int(matches.found.sum()))


def _scored(ids: Sequence[np.ndarray[tuple[int], np.dtype[np.int32]]]) -> BoolArray:
    """Which tokens of the text, documents one after another, are scored: all but the first of each."""
    scored = np.ones(sum(map(len, ids)), bool)
    scored[np.cumsum([0, *map(len, ids)])[:-1][[len(tokens) > 0 for tokens in ids]]] = False
    return scored


def _most_overlapping(store: Datastore, matches: Matches) -> tuple[DocumentOverlap, ...]:
    found = matches.in_documents
    rows = np.lexsort((np.arange(len(found)), -found))[:NAMED_DOCUMENTS]
    rows = rows[found[rows] > 0]
    names, sources = (store.documents.texts(column, rows) for column in ("id", "source"))
    sequences = (store.documents.token_counts[rows] - matches.length + 1).tolist()
    return tuple(DocumentOverlap(*facts) for facts in zip(names, sources, sequences, found[rows].tolist(), strict=True))
