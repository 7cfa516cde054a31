"""An n-gram LM from the tokens of a datastore: interpolated modified Kneser-Ney (Chen & Goodman, 1999, section 3).

::

    p_n(w | h) = max(a(hw) - D(a(hw)), 0) / Σ_v a(hv) + γ(h) p_{n-1}(w | h')      h' = h without its first token

a(g): how often g stands in the text, for the highest order and for n-grams at a document's beginning; else how many
different tokens stand before it. D is one of three discounts of each order, for a = 1, 2 and more; γ(h) is what they
take away, so that probabilities add up to 1. Order 1 is mixed with the uniform distribution over the vocabulary in the
same way, so no token is impossible. A border stands before each document: no n-gram crosses it, none predicts it.

Each distinct n-gram has a number, its place in the sorted list of its order; as a key there, the number of its first
n-1 tokens and its last token make one int64. Counting is sorting, looking up is a binary search, and nothing is hashed.
Counting takes 100 to 180 bytes of memory a token, and about a second for a million on one core; a model keeps 6 to 45.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidInput

ORDER = 4
MOST_TOKENS = 20_000_000
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
TOKENS_AT_ONCE = 1 << 20

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class NGramTable:
    """n-grams of one length, m of them. ``grams`` [m] int64, ascending: number of the first n-1 tokens x (vocabulary + 1) +
    last token; ``own`` [m] float32: the part of p(w | h) that is their own; ``rest`` float32, [number of (n-1)-grams]: γ
    of each as a context, 1 where nothing follows it."""

    grams: Ints
    own: Floats
    rest: Floats

    def numbers(self, keys: Ints) -> Ints:
        """Place of each of ``keys`` [t] among the n-grams, -1 where it is none: [t]."""
        if not len(self.grams):
            return np.full(len(keys), -1)
        places = np.searchsorted(self.grams, keys).clip(max=len(self.grams) - 1)
        return np.where(self.grams[places] == keys, places, -1)


class NGramModel:
    """Use :meth:`of_store` or :meth:`train`. ``order``: tokens of its longest n-grams; ``tokens``: how many it was made from."""

    def __init__(self, vocabulary_size: int, unigram: Floats, tables: Sequence[NGramTable], tokens: int) -> None:
        self.vocabulary_size, self.tokens = vocabulary_size, tokens
        self.order = 1 + len(tables)
        self._unigram, self._tables = unigram, tables

    @classmethod
    def of_store(cls, store: Datastore, order: int = ORDER, *, without: Sequence[int] = (), most_tokens: int = MOST_TOKENS) -> NGramModel:
        """From all documents of ``store`` that are not removed, but those numbered ``without`` in its table.

        Raises :class:`InvalidInput` for more than ``most_tokens`` tokens: memory follows them.
        """
        table = store.documents
        kept = np.setdiff1d(np.arange(len(table)), [*store.tombstones.documents.tolist(), *without])
        count = int(table.token_counts[kept].sum())
        if count > most_tokens:
            raise InvalidInput(
                "baselines", f"an n-gram of {count:,} tokens is asked for, but at most {most_tokens:,} are counted; leave it out."
            )
        starts, counts = table.token_starts[kept], table.token_counts[kept]
        ranges = zip(starts.tolist(), (starts + counts).tolist(), strict=True)
        return cls.train([store.tokens.slice(*part).numpy() for part in ranges], store.manifest.model.vocabulary_size, order)

    @classmethod
    def train(cls, documents: Sequence[np.ndarray[Any, Any]], vocabulary_size: int, order: int = ORDER) -> NGramModel:
        """From token ids (1-D arrays), each 0 to ``vocabulary_size`` - 1. ``order``: at least 2."""
        if order < 2:
            raise InvalidInput("order", f"is {order}, but an n-gram needs at least 2.")
        stream, places = _stream(documents, vocabulary_size)
        levels = list(_count(stream, places, vocabulary_size, order))
        contexts = [vocabulary_size + 1, *(len(level.grams) for level in levels)]
        tables = [_table(level, contexts[n], vocabulary_size) for n, level in enumerate(levels)]
        return cls(vocabulary_size, _unigram(levels[0], stream, vocabulary_size), tables, len(stream) - len(documents))

    def log_probs(self, documents: Sequence[np.ndarray[Any, Any]]) -> Floats:
        """log p of token 1, 2, … of each document (1-D arrays of ids), its context within the document: [tokens] float32, in
        the order of ``compare``."""
        parts = [self._part(*_stream(part, self.vocabulary_size)) for part in _portions(documents)]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def _part(self, stream: Ints, places: Ints) -> Floats:
        probability = self._unigram[stream].astype(np.float64)
        numbers = stream
        for table in self._tables:
            # A border has no context: what stands before it is another document.
            contexts = np.where(places > 0, np.concatenate([[-1], numbers])[:-1], -1)
            numbers = table.numbers(np.where(contexts >= 0, contexts * (self.vocabulary_size + 1) + stream, -1))
            probability = _at(table.own, numbers, 0) + _at(table.rest, contexts, 1) * probability
        return np.log(probability[places > 1]).astype(np.float32)


def _at(values: Floats, numbers: Ints, missing: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``values`` by number, ``missing`` where that is -1."""
    found = np.full(len(numbers), missing, np.float64)
    known = numbers >= 0
    found[known] = values[numbers[known]]
    return found


@dataclass(frozen=True)
class _Level:
    """Distinct n-grams of one length: their keys, how often each counts, and where in the stream one of each ends."""

    grams: Ints
    counts: Ints
    ends: Ints


def _stream(documents: Sequence[np.ndarray[Any, Any]], border: int) -> tuple[Ints, Ints]:
    """All documents after one another, a border before each, and how far from it each token is (0: the border itself)."""
    pieces = [piece for ids in documents for piece in (np.array([border]), ids.astype(np.int64))]
    stream = np.concatenate([np.zeros(0, np.int64), *pieces])
    lengths = np.array([len(ids) + 1 for ids in documents], np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    return stream, np.arange(len(stream)) - starts


def _portions(documents: Sequence[np.ndarray[Any, Any]]) -> Iterator[list[np.ndarray[Any, Any]]]:
    """Documents in groups of about a million tokens, so that memory follows the group."""
    group: list[np.ndarray[Any, Any]] = []
    tokens = 0
    for ids in documents:
        group.append(ids)
        tokens += len(ids)
        if tokens >= TOKENS_AT_ONCE:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _count(stream: Ints, places: Ints, vocabulary_size: int, order: int) -> Iterator[_Level]:
    """Levels 2 to ``order``, with the counts that Kneser-Ney smoothing takes."""
    numbers, level = stream, None
    for n in range(2, order + 1):
        ends = np.flatnonzero(places >= n - 1)
        grams, first, inverse, counts = np.unique(
            numbers[ends - 1] * (vocabulary_size + 1) + stream[ends], return_index=True, return_inverse=True, return_counts=True
        )
        if level is not None:
            yield _adjusted(level, numbers[ends[first]], places, n - 1)
        level = _Level(grams, counts, ends[first])
        numbers = np.full(len(stream), -1)
        numbers[ends] = inverse
    assert level is not None
    yield level


def _adjusted(level: _Level, suffixes: Ints, places: Ints, n: int) -> _Level:
    """The level with numbers of different tokens before each n-gram, but how often it stands there for those that begin at a
    border. ``suffixes``: number of the last n tokens of each (n+1)-gram."""
    before = np.bincount(suffixes, minlength=len(level.grams))
    return _Level(level.grams, np.where(places[level.ends] == n - 1, level.counts, before), level.ends)


def _table(level: _Level, contexts: int, vocabulary_size: int) -> NGramTable:
    context = level.grams // (vocabulary_size + 1)
    discounts = _discounts(level.counts)[np.minimum(level.counts, 3)]
    totals = np.bincount(context, weights=level.counts, minlength=contexts)
    taken = np.bincount(context, weights=discounts, minlength=contexts)
    rest = np.divide(taken, totals, out=np.ones(contexts), where=totals > 0)
    own = (level.counts - discounts) / totals[context]
    return NGramTable(level.grams, own.astype(np.float32), rest.astype(np.float32))


def _unigram(bigrams: _Level, stream: Ints, vocabulary_size: int) -> Floats:
    """p_1 of every token and, never asked for, the border: [vocabulary + 1]."""
    counts = np.bincount(stream[bigrams.ends], minlength=vocabulary_size + 1)
    total = max(int(counts.sum()), 1)
    discounts = np.where(counts > 0, _discounts(counts[counts > 0])[np.minimum(counts, 3)], 0)
    rest = discounts.sum() / total if counts.any() else 1.0
    return ((counts - discounts) / total + rest / vocabulary_size).astype(np.float32)


def _discounts(counts: Ints) -> np.ndarray[Any, np.dtype[np.float64]]:
    """D for a = 0 (none), 1, 2, and 3 or more, from how many n-grams have a = 1 to 4 (Chen & Goodman, equation 26).

    Where these numbers are too few to give discounts of 0 to a, they are 0.5, 1 and 1.5, as Heafield's KenLM falls back to.
    """
    n1, n2, n3, n4 = (int((counts == a).sum()) for a in (1, 2, 3, 4))
    if n1 and n2 and n3:
        share = n1 / (n1 + 2 * n2)
        found = tuple(a - (a + 1) * share * more / fewer for a, more, fewer in ((1, n2, n1), (2, n3, n2), (3, n4, n3)))
        if all(0 <= discount <= a for a, discount in enumerate(found, 1)):
            return np.array([0, *found])
    return np.array([0, *FALLBACK_DISCOUNTS])
