"""Which token sequences of a text stand in a datastore, and in which of its documents.

64-bit polynomial hashes stand for the sequences. The datastore's tokens are read in pieces, so memory follows the text, not
the store. A sequence that runs over the end of a document stands nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.datastore.reader import ShardedRows
from knnlm.evaluation.comparison import BoolArray, LongArray

CHUNK = 1 << 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Tokens = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layout:
    """Where documents lie in a stream of tokens: ``starts`` and ``counts`` [documents] int64, in order and without gaps."""

    starts: LongArray
    counts: LongArray

    def of(self, positions: LongArray) -> LongArray:
        """Number of the document of each position of the stream."""
        return np.searchsorted(self.starts, positions, side="right") - 1


@dataclass(frozen=True)
class Matches:
    """Sequences of ``length`` tokens. ``found`` [tokens of the text] bool: one that stands in the datastore begins here;
    ``sequences``: how many the text has; ``in_documents`` [documents of the datastore] int64: how many of theirs stand in the
    text."""

    length: int
    sequences: int
    found: BoolArray
    in_documents: LongArray

    def covered(self) -> BoolArray:
        """Tokens of the text that lie in a sequence that was found: [tokens of the text]."""
        starts = np.flatnonzero(self.found)
        edges = np.zeros(len(self.found) + 1, np.int64)
        edges[starts] += 1
        edges[starts + self.length] -= 1
        return np.cumsum(edges[:-1]) > 0


def find_sequences(
    documents: Sequence[Tokens], stored: ShardedRows, layout: Layout, ranges: Iterable[tuple[int, int]], length: int
) -> Matches:
    """Look for the text's sequences of ``length`` tokens, ``documents`` of it one after another, in ``ranges`` [start, stop) of
    the stored stream, whose documents lie as ``layout`` says. Ranges hold whole documents."""
    hashes = [sequence_hashes(document, length) for document in documents]
    wanted, numbers = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_inverse=True)
    found, in_documents = np.zeros(len(wanted), bool), np.zeros(len(layout.starts), np.int64)
    sieve = _Sieve(wanted)
    for first, last in ranges if len(wanted) else ():
        for start in range(first, last, CHUNK):
            piece = stored.slice(start, min(start + CHUNK + length - 1, last)).numpy()
            places, which = sieve.find(sequence_hashes(piece, length))
            of = layout.of(places + start)
            whole = places + start + length <= layout.starts[of] + layout.counts[of]
            found[which[whole]] = True
            in_documents += np.bincount(of[whole], minlength=len(in_documents))
    beginnings = np.concatenate([np.zeros(0, bool), *(_beginnings(len(document), length) for document in documents)])
    flags = np.zeros(len(beginnings), bool)
    flags[beginnings] = found[numbers.reshape(-1)]
    return Matches(length, len(numbers), flags, in_documents)


def _beginnings(tokens: int, length: int) -> BoolArray:
    """Whether a sequence can begin at each of a document's tokens."""
    return np.arange(tokens) <= tokens - length


class _Sieve:
    """Finds hashes among many: a table of their first bits lets nearly all others fall through without a search."""

    def __init__(self, wanted: Hashes) -> None:
        self._wanted = wanted
        bits = min(max(len(wanted).bit_length() + 4, 16), 26)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[wanted >> self._shift] = True

    def find(self, hashes: Hashes) -> tuple[LongArray, LongArray]:
        """Places in ``hashes`` of those that are wanted, and their numbers among the wanted ones."""
        places = np.flatnonzero(self._table[hashes >> self._shift])
        which = np.searchsorted(self._wanted, hashes[places])
        which[which == len(self._wanted)] = 0
        same = self._wanted[which] == hashes[places]
        return places[same], which[same]


def sequence_hashes(tokens: Tokens, length: int) -> Hashes:
    """Hashes of all sequences of ``length`` tokens, by where they begin: [tokens - length + 1], empty where there are none.

    A polynomial over scattered token ids, put together out of those of 1, 2, 4, ... tokens.
    """
    if len(tokens) < length:
        return np.zeros(0, np.uint64)
    block, width = _scattered(tokens), 1
    whole, covered = np.zeros(len(tokens) + 1, np.uint64), 0
    while True:
        if length & width:
            whole = _joined(whole, covered, block, width)
            covered += width
        if covered == length:
            return whole
        block, width = _joined(block, width, block, width), 2 * width


def _joined(left: Hashes, width: int, right: Hashes, right_width: int) -> Hashes:
    """Hashes of sequences of ``width`` + ``right_width`` tokens out of those of their beginnings and ends."""
    count = len(left) - right_width
    power = np.uint64(pow(int(_MULTIPLIER), right_width, 1 << 64))
    joined: Hashes = left[:count] * power + right[width : width + count]
    return joined


def _scattered(tokens: Tokens) -> Hashes:
    """The finalizer of SplitMix64 (Steele et al., 2014), so that ids near one another share no bits."""
    values = tokens.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scattered: Hashes = values ^ (values >> np.uint64(31))
    return scattered
