"""Does the evaluated text stand in the datastore? Then perplexity with retrieval says nothing about new text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from knnlm.datastore.reader import ShardedRows

NGRAM = 13
CHUNK = 1 << 20
_BASE = np.uint64(0x9E3779B97F4A7C15)

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def ngram_overlap(
    documents: Iterable[np.ndarray[Any, Any]], stored: ShardedRows, ranges: Iterable[tuple[int, int]] | None = None
) -> float:
    """Share (0 to 1) of the documents' 13-token sequences that stand somewhere in the stored token stream.

    ``ranges`` [start, stop) of the stream are looked at (None: all of it).

    13 tokens is what Brown et al. (2020), appendix C, take for decontamination. 64-bit polynomial hashes stand for the
    sequences; stored tokens are read in pieces, so memory follows the documents, not the store.
    """
    hashes = np.concatenate([np.zeros(0, np.uint64), *(_ngram_hashes(document) for document in documents)])
    if not len(hashes):
        return 0.0
    wanted, counts = np.unique(hashes, return_counts=True)
    found = np.zeros(len(wanted), dtype=bool)
    for first, last in [(0, len(stored))] if ranges is None else ranges:
        for start in range(first, last, CHUNK):
            piece = stored.slice(start, min(start + CHUNK + NGRAM - 1, last)).numpy()
            found |= np.isin(wanted, _ngram_hashes(piece))
    return float(counts[found].sum() / counts.sum())


def _ngram_hashes(tokens: np.ndarray[Any, Any]) -> Hashes:
    count = len(tokens) - NGRAM + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, np.uint64)
    for place in range(NGRAM):
        hashes = (hashes * _BASE) ^ (values[place : place + count] * np.uint64(0xC2B2AE3D27D4EB4F))
    return hashes
