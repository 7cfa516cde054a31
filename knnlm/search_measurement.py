"""How far a search setting is from exact search: total variation of the kNN distributions, recall, bytes read.

Candidates are measured again by the product's own :class:`~knnlm.retrieval.Retriever`, once for the most of them; those of
a smaller over-fetch are the first in the index's order, so one search serves every k and over-fetch. No clock is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.datastore.reader import ShardedRows
from knnlm.distribution import knn_token_log_probs, log_weights
from knnlm.entry_mask import EntryMask
from knnlm.index import Candidates, ExactIndex, NeighborIndex
from knnlm.interpolation import effective_weight, interpolate
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.search_positions import Positions
from knnlm.search_settings import SearchPoint, SearchSetting, SearchSettings

REFERENCE_OVERFETCH = 1.25
PAGE_BYTES = 4096
DIGITS = 6


@dataclass(frozen=True)
class Searched:
    """What is searched: an ``index``, its stored ``keys`` (None: none are) and ``values``, the entries that are
    ``allowed`` (None: all). ``index_bytes``: size of the index's files; ``vocabulary_size`` of the model."""

    index: NeighborIndex
    keys: ShardedRows | None
    values: ShardedRows
    allowed: EntryMask | None
    index_bytes: int
    vocabulary_size: int

    @property
    def distance(self) -> str:
        """``exact`` where distances are measured from stored keys, else ``index``."""
        return "index" if self.keys is None else "exact"

    @property
    def live_entries(self) -> int:
        """Entries that may be found."""
        return self.index.entries if self.allowed is None else self.allowed.allowed

    def bytes_read(self, setting: SearchSetting) -> int:
        """Bytes that one query reads: the index's files by the share of cells probed, and the keys that are measured
        again, each in whole pages of 4,096 bytes, since they lie anywhere."""
        index = self.index
        cells = self.index_bytes * setting.probes / index.nlist if index.nlist else self.index_bytes
        if self.keys is None:
            return round(cells)
        key = self.keys.slice(0, 1)
        pages = -(-key.numel() * key.element_size() // PAGE_BYTES)
        return round(cells) + min(math.ceil(setting.overfetch * setting.k), index.entries) * pages * PAGE_BYTES


class SearchMeasurement:
    """Measures settings at ``positions``, against exact search over the stored keys.

    Where no keys are stored, against the index's own search of all its cells. ``ks`` are capped at the entries that each
    position may find. ``temperature`` T of the distributions.
    """

    def __init__(self, searched: Searched, positions: Positions, ks: Sequence[int], temperature: float) -> None:
        self.searched, self.positions, self.temperature = searched, positions, temperature
        longest = int((positions.left_out[:, 1] - positions.left_out[:, 0]).max()) if len(positions) else searched.live_entries
        self.ks = sorted({min(k, searched.live_entries - longest) for k in ks} - {0})
        index: NeighborIndex = searched.index if searched.keys is None else ExactIndex(searched.keys)
        self._exact = Neighbors.empty(len(positions))
        if self.ks:
            count = math.ceil(REFERENCE_OVERFETCH * max(self.ks))
            self._exact = self._ranked(index, count, index.nlist).first(max(self.ks))

    @property
    def reference(self) -> str:
        """What points are compared with."""
        return "exact search over the stored keys" if self.searched.keys is not None else "the index's own search of all its cells"

    def at(self, probes: int, count: int) -> Callable[[int, float], SearchPoint]:
        """Search each position once with ``probes`` for ``count`` candidates; return what gives the point of any (k,
        over-fetch) that needs no more of them."""
        ranked = self._ranked(self.searched.index, count, probes)
        return lambda k, overfetch: self._point(SearchSetting(k, probes, overfetch), ranked.first(k, overfetch))

    def _point(self, setting: SearchSetting, found: Neighbors) -> SearchPoint:
        exact = self._exact.nearest(setting.k)
        variation = total_variation(found, exact, self.temperature)
        change = self._cross_entropy(found) - self._cross_entropy(exact)
        return SearchPoint(
            k=setting.k,
            probes=setting.probes,
            overfetch=setting.overfetch,
            total_variation=_rounded(variation.mean()),
            standard_error=_rounded(variation.std() / math.sqrt(len(variation))) if len(variation) > 1 else 0.0,
            total_variation_p95=_rounded(variation.quantile(0.95)),
            total_variation_max=_rounded(variation.max()),
            recall=_rounded(recall(found, exact).mean()),
            cross_entropy_change=_rounded(change.mean()),
            bytes_read=self.searched.bytes_read(setting),
        )

    def _cross_entropy(self, neighbors: Neighbors) -> Tensor:
        """Nats of the values [q] in a mixture whose base LM knows nothing; with any better one differences are smaller."""
        knn = knn_token_log_probs(neighbors, self.temperature, self.positions.values)
        uniform = torch.full_like(knn, -math.log(self.searched.vocabulary_size))
        weight = effective_weight(torch.full((len(knn),), Mixture().weight, dtype=torch.float64), neighbors.found)
        return -interpolate(uniform, knn, weight).double()

    def _ranked(self, index: NeighborIndex, count: int, probes: int) -> _Ranked:
        count = min(count, index.entries)
        candidates = _candidates(index, self.positions, self.searched.allowed, count, probes)
        again = Retriever(
            _Found(candidates, index.entries), self.searched.keys, self.searched.values, SearchSettings.fixed(0, count, 0, 1.0)
        )
        return _Ranked.of(candidates, again.retrieve(self.positions.queries, count))


@dataclass(frozen=True)
class _Ranked:
    """All candidates of each position as neighbours [q, c], nearest first, and the ``rank`` [q, c] of each among what the
    index returned."""

    neighbors: Neighbors
    rank: Tensor

    @classmethod
    def of(cls, candidates: Candidates, neighbors: Neighbors) -> _Ranked:
        """``neighbors`` are ``candidates`` in another order."""
        ranks = candidates.ids.argsort(dim=1, stable=True)
        return cls(neighbors, torch.empty_like(ranks).scatter_(1, neighbors.ids.argsort(dim=1, stable=True), ranks))

    def first(self, k: int, overfetch: float = math.inf) -> Neighbors:
        """The k nearest of the first ceil(``overfetch`` · k) candidates."""
        places = _front(self.neighbors.found & (self.rank < overfetch * k), k)
        kept = places >= 0
        places = places.clamp(min=0)
        near = self.neighbors
        return Neighbors(
            torch.where(kept, near.distances.gather(1, places), torch.inf),
            torch.where(kept, near.tokens.gather(1, places), 0),
            torch.where(kept, near.ids.gather(1, places), -1),
        )


class _Found:
    """Candidates that were found before, in front of a :class:`Retriever` that asks for all of its rows at once."""

    nlist = 0
    description = "candidates found before"

    def __init__(self, candidates: Candidates, entries: int) -> None:
        self._candidates, self.entries = candidates, entries

    def search(self, queries: Tensor, k: int, count: int, *, probes: int, allowed: EntryMask | None = None) -> Candidates:
        """See :meth:`NeighborIndex.search`."""
        return Candidates(self._candidates.distances[:, :count], self._candidates.ids[:, :count])


def _rounded(value: Tensor) -> float:
    """Without the last bits, in which sums differ between machines."""
    return round(float(value), DIGITS) + 0.0


def _front(kept: Tensor, count: int) -> Tensor:
    """Places of the first ``count`` kept ones of each row [q, c] bool, in order; -1 where there are fewer."""
    number = kept.cumsum(dim=1)
    rows, columns = (kept & (number <= count)).nonzero(as_tuple=True)
    places = torch.full((len(kept), count), -1)
    places[rows, number[rows, columns] - 1] = columns
    return places


def _candidates(index: NeighborIndex, positions: Positions, allowed: EntryMask | None, count: int, probes: int) -> Candidates:
    """The first ``count`` of each position without those that it may not find.

    All positions are searched together for some more than that; only those with too many of their own document among
    the nearest are searched again, with a mask of their own.
    """
    queries, first, last = positions.queries, positions.left_out[:, :1], positions.left_out[:, 1:]
    wanted = count + min(count, int((last - first).max()))
    found = index.search(queries, wanted, wanted, probes=probes, allowed=allowed)
    kept = (found.ids >= 0) & ((found.ids < first) | (found.ids >= last))
    places = _front(kept, count)
    distances = torch.where(places >= 0, found.distances.gather(1, places.clamp(min=0)), torch.inf)
    ids = torch.where(places >= 0, found.ids.gather(1, places.clamp(min=0)), -1)
    short = (places[:, -1] < 0) & (found.ids[:, -1] >= 0)
    for start, stop in {(start, stop) for start, stop in positions.left_out[short].tolist()}:
        rows = (short & (first[:, 0] == start) & (last[:, 0] == stop)).nonzero()[:, 0]
        mask = (allowed or EntryMask.without(index.entries, ())).without_range(start, stop)
        alone = index.search(queries[rows], count, count, probes=probes, allowed=mask)
        distances[rows], ids[rows] = alone.distances, alone.ids
    return Candidates(distances, ids)


def total_variation(one: Neighbors, other: Neighbors, temperature: float) -> Tensor:
    """½ Σ over tokens of the difference of both p_kNN: [n] float64, 0 to 1; 1 where only one of them found anything."""
    weights = torch.cat([log_weights(one, temperature).exp(), -log_weights(other, temperature).exp()], dim=1)
    tokens, order = torch.cat([one.tokens, other.tokens], dim=1).sort(dim=1)
    segment = torch.zeros_like(tokens)
    segment[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).cumsum(1)
    differences = torch.zeros_like(weights).scatter_add_(1, segment, weights.gather(1, order))
    only_one = one.found.any(1) != other.found.any(1)
    return torch.where(only_one, 1.0, differences.abs().sum(1) / 2)


def recall(found: Neighbors, exact: Neighbors) -> Tensor:
    """Share of the neighbours in ``exact`` that are in ``found``: [n] float64; 1 where there is none to find."""
    ids = torch.cat([found.ids, exact.ids], dim=1).sort(dim=1).values
    both = ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).sum(1).double()
    there = exact.found.sum(1).double()
    return torch.where(there > 0, both / there.clamp(min=1), 1.0)
