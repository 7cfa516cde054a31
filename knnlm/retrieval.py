"""Retrieval: candidates from an index, exact distances from the stored keys, values; together, neighbours.

Codes bring candidates cheaply and their distances wrongly, so every candidate is measured again: squared L2 in float32
from the stored keys, whatever the index. A datastore without keys has the index's own distances; one softmax never
mixes the two kinds. Each row's neighbours are its own; no other row of the batch changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from knnlm.entry_mask import EntryMask
from knnlm.errors import InvalidInput
from knnlm.index import Candidates, NeighborIndex
from knnlm.neighbors import Neighbors
from knnlm.search_settings import SearchSettings

RERANK_FLOATS = 1 << 22


class Gatherable(Protocol):
    """Rows that can be read by number."""

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [m] int64 in that order."""


def everything() -> EntryMask | None:
    """No entry is left out."""
    return None


class Retriever:
    """Finds the k nearest entries of each query.

    ``keys`` [entries, dimension] (None: not stored) and ``values`` [entries] are read for the candidates alone.
    ``settings`` say how far the index looks (None: by rule); ``allowed`` is asked at each call which entries may be
    found, so that removed ones vanish while requests are running.
    """

    def __init__(
        self, index: NeighborIndex, keys: Gatherable | None, values: Gatherable, settings: SearchSettings | None = None,
        allowed: Callable[[], EntryMask | None] = everything,
    ) -> None:  # fmt: skip
        self.index, self.settings = index, settings or SearchSettings(index.nlist, index.entries)
        self._keys, self._values, self._allowed = keys, values, allowed

    @property
    def distance(self) -> str:
        """``exact`` where distances are measured from stored keys, else ``index``."""
        return "index" if self._keys is None else "exact"

    def retrieve(self, queries: Tensor, k: Tensor | int) -> Neighbors:
        """Neighbours of ``queries`` [n, d], with ``k`` one number or one per row [n] int64 (0: none for that row).

        The result is as wide as the largest k; rows that ask for fewer, or find fewer, are filled up with id -1. Rows
        are searched together with those of the same k, so neither batch nor order changes a row's result.
        """
        queries = queries.float()
        wanted = torch.as_tensor(k).expand(len(queries))
        distinct = sorted(set(wanted.tolist()))
        if distinct and distinct[0] < 0:
            raise InvalidInput("k", f"is {distinct[0]}, but must be 0 or more.")
        sizes = [size for size in distinct if size > 0]
        allowed = self._allowed()
        if len(distinct) == 1 and sizes:
            return self._same_k(queries, sizes[0], allowed)
        out = Neighbors.empty(len(queries), max(sizes, default=0))
        for size in sizes:
            rows = (wanted == size).nonzero()[:, 0]
            part = self._same_k(queries[rows], size, allowed)
            out.distances[rows, :size], out.tokens[rows, :size], out.ids[rows, :size] = part.distances, part.tokens, part.ids
        return out

    def measure(self, queries: Tensor, ids: Tensor) -> Neighbors:
        """The entries ``ids`` [n, k] (-1: none; each once in a row) as neighbours of ``queries`` [n, d], by exact distance.

        Keys must be stored.
        """
        assert self._keys is not None
        return self._in_parts(queries.float(), ids, ids.shape[1], self._keys)

    def _same_k(self, queries: Tensor, k: int, allowed: EntryMask | None) -> Neighbors:
        setting = self.settings.for_k(k, None if allowed is None else allowed.allowed)
        count = k if self._keys is None else math.ceil(setting.overfetch * k)
        if allowed is None:
            candidates = self.index.search(queries, k, count, probes=setting.probes)
        else:
            candidates = self._allowed_candidates(queries, k, count, setting.probes, allowed)
        ids = candidates.ids
        if self._keys is None:
            ids, order = ids.sort(dim=1, stable=True)
            return self._nearest(candidates.distances.gather(1, order), ids, k)
        return self._in_parts(queries, ids, k, self._keys)

    def _in_parts(self, queries: Tensor, ids: Tensor, k: int, stored: Gatherable) -> Neighbors:
        """:meth:`_measured` in bounded memory."""
        rows = max(1, RERANK_FLOATS // (ids.shape[1] * queries.shape[1]))
        parts = [self._measured(q, i, k, stored) for q, i in zip(queries.split(rows), ids.split(rows), strict=True)]
        if len(parts) == 1:
            return parts[0]
        return Neighbors(*(torch.cat([getattr(part, name) for part in parts]) for name in ("distances", "tokens", "ids")))

    def _allowed_candidates(self, queries: Tensor, k: int, count: int, probes: int, allowed: EntryMask) -> Candidates:
        """Candidates that are allowed. A row that finds fewer than k looks into twice as many cells, as often as it takes.

        Documents that are removed together lie together, so the nearest cells of a query may have lost all they held.
        """
        found = self.index.search(queries, k, count, probes=probes, allowed=allowed)
        # An index may know nothing of removals; what is not allowed is no neighbour, whatever came back.
        ids = torch.where(allowed.allows(found.ids), found.ids, -1)
        distances, enough = found.distances, min(k, allowed.allowed)
        few = ((ids >= 0).sum(1) < enough).nonzero()[:, 0]
        if len(few) and probes < self.index.nlist:
            wider = self._allowed_candidates(queries[few], k, count, min(2 * probes, self.index.nlist), allowed)
            distances, ids = distances.index_copy(0, few, wider.distances), ids.index_copy(0, few, wider.ids)
        return Candidates(distances, ids)

    def _measured(self, queries: Tensor, ids: Tensor, k: int, stored: Gatherable) -> Neighbors:
        """Neighbours out of candidates [n, c], by exact distance."""
        # Ascending ids make the reads sequential.
        ids = ids.sort(dim=1).values
        keys = stored.gather(ids.clamp(min=0).flatten()).to(queries.device).float().view(*ids.shape, -1)
        return self._nearest(keys.sub_(queries.unsqueeze(1)).square_().sum(2).cpu(), ids, k)

    def _nearest(self, distances: Tensor, ids: Tensor, k: int) -> Neighbors:
        """The first k of candidates [n, c] by (distance, id); ``ids`` ascend, so a stable sort breaks ties by id."""
        distances = torch.where(ids >= 0, distances, torch.inf)
        nearest, order = distances.sort(dim=1, stable=True)
        nearest, order = nearest[:, :k], order[:, :k]
        ids = ids.gather(1, order)
        tokens = self._values.gather(ids.clamp(min=0).flatten()).view(ids.shape).long()
        return Neighbors(nearest, torch.where(ids >= 0, tokens, 0), ids)
