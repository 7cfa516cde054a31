"""All tokens in groups by one property: how often the datastore has the token, whether it came before, how near a neighbour is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from knnlm.datastore.reader import ShardedRows
from knnlm.evaluation.comparison import BoolArray, Breakdown, FloatArray, Group, LongArray
from knnlm.evaluation.overlap import CHUNK, Tokens
from knnlm.evaluation.statistics import Clusters, intervals_of_means, perplexity, relative

DECILES = 10


@dataclass(frozen=True)
class Scores:
    """Of n tokens, each [n] float32: log-probabilities by the base LM and by the mixture, and λ."""

    lm: FloatArray
    mixed: FloatArray
    weight: FloatArray

    @property
    def gain(self) -> FloatArray:
        """:func:`gain_of` the mixture over the base LM."""
        return gain_of(self.lm, self.mixed)


def gain_of(before: FloatArray, after: FloatArray) -> FloatArray:
    """Change of log-probabilities [n] in nats; 0 where both find a token impossible."""
    with np.errstate(invalid="ignore"):
        return np.where(before == after, np.float32(0), after - before)


@dataclass(frozen=True)
class Part:
    """A group before its figures are known: ``members`` [n] bool, and the least and largest value that puts a token in it."""

    name: str
    members: BoolArray
    low: float | None = None
    high: float | None = None


def groups(scores: Scores, clusters: Clusters, parts: Sequence[Part]) -> list[Group]:
    """The figures of each part that has any token, in order."""
    kept = [part for part in parts if part.members.any()]
    gain = scores.gain
    intervals = intervals_of_means(gain, clusters, [part.members for part in kept])[1:]
    made = []
    for part, interval in zip(kept, intervals, strict=True):
        lm, mixed, own = scores.lm[part.members], scores.mixed[part.members], gain[part.members]
        base, knn = perplexity(lm), perplexity(mixed)
        facts = len(own), base, knn, knn / base - 1, relative(interval), float((own > 0).mean())
        made.append(Group(part.name, *facts, float(scores.weight[part.members].mean(dtype=np.float64)), part.low, part.high))
    return made


def breakdown(by: str, title: str, scores: Scores, clusters: Clusters, parts: Sequence[Part]) -> Breakdown:
    """:func:`groups` under one name."""
    return Breakdown(by, title, tuple(groups(scores, clusters, parts)))


def token_counts(stored: ShardedRows, ranges: Iterable[tuple[int, int]], vocabulary_size: int) -> LongArray:
    """How often each token stands in ``ranges`` [start, stop) of the stored stream: [vocabulary_size] int64."""
    counts = np.zeros(vocabulary_size, np.int64)
    for first, last in ranges:
        for start in range(first, last, CHUNK):
            counts += np.bincount(stored.slice(start, min(start + CHUNK, last)).numpy(), minlength=vocabulary_size)
    return counts


def frequency_parts(frequency: LongArray) -> list[Part]:
    """By decade of how often the token stands in the datastore: never, 1 to 9, 10 to 99, and so on."""
    parts = [Part("never", frequency == 0, 0, 0)]
    low = 1
    while low <= frequency.max(initial=0):
        high = 10 * low - 1
        parts.append(Part(f"{low:,} to {high:,}", (frequency >= low) & (frequency <= high), low, high))
        low *= 10
    return parts


def occurrence_parts(documents: Sequence[Tokens]) -> list[Part]:
    """By whether the token came before in the text; the first token of each document counts, but is not scored."""
    ids = np.concatenate(documents).astype(np.int64)
    lengths = [len(document) for document in documents]
    number = np.repeat(np.arange(len(documents)), lengths)
    first_in_text, first_in_document = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    first_in_text[np.unique(ids, return_index=True)[1]] = True
    first_in_document[np.unique(number * (int(ids.max()) + 1) + ids, return_index=True)[1]] = True
    scored = np.concatenate([np.arange(length) > 0 for length in lengths])
    return [
        Part("first in the text", first_in_text[scored]),
        Part("first in its document, not in the text", (first_in_document & ~first_in_text)[scored]),
        Part("again in its document", ~first_in_document[scored]),
    ]


def distance_parts(nearest: FloatArray) -> list[Part]:
    """By decile of the squared distance to the nearest neighbour; tokens without one (not searched, or none found) apart."""
    found = np.isfinite(nearest)
    parts = []
    if found.any():
        edges = np.quantile(nearest[found], np.arange(1, DECILES) / DECILES)
        decile = np.searchsorted(edges, nearest, side="left")
        for place in range(DECILES):
            members = found & (decile == place)
            if members.any():
                low, high = float(nearest[members].min()), float(nearest[members].max())
                parts.append(Part(f"{low:.4g} to {high:.4g}", members, low, high))
    return [*parts, Part("no neighbour", ~found)]
