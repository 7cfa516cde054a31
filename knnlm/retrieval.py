"""Retrieval: candidates from an index, exact distances from the stored keys, values; together, neighbours.

Codes bring candidates cheaply and their distances wrongly, so every candidate is measured again: squared L2 in float32
from the stored keys, whatever the index. Each row's neighbours are its own; no other row of the batch changes them.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from knnlm.errors import InvalidInput
from knnlm.index import NeighborIndex
from knnlm.neighbors import Neighbors

OVERFETCH = 2.0
RERANK_FLOATS = 1 << 22


class Gatherable(Protocol):
    """Rows that can be read by number."""

    def gather(self, rows: Tensor) -> Tensor:
        """Rows [m] int64 in that order."""


class Retriever:
    """Finds the k nearest entries of each query.

    ``index`` gives ceil(``overfetch``·k) candidates per row; ``keys`` [entries, dimension] and ``values`` [entries]
    are read for those alone.
    """

    def __init__(self, index: NeighborIndex, keys: Gatherable, values: Gatherable, overfetch: float = OVERFETCH) -> None:
        if not 1 <= overfetch < math.inf:
            raise InvalidInput("overfetch", f"is {overfetch}, but must be 1 or more.")
        self.index, self.overfetch = index, overfetch
        self._keys, self._values = keys, values

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
        if len(distinct) == 1 and sizes:
            return self._same_k(queries, sizes[0])
        out = Neighbors.empty(len(queries), max(sizes, default=0))
        for size in sizes:
            rows = (wanted == size).nonzero()[:, 0]
            part = self._same_k(queries[rows], size)
            out.distances[rows, :size], out.tokens[rows, :size], out.ids[rows, :size] = part.distances, part.tokens, part.ids
        return out

    def _same_k(self, queries: Tensor, k: int) -> Neighbors:
        count = math.ceil(self.overfetch * k)
        ids = self.index.search(queries, k, count).ids
        rows = max(1, RERANK_FLOATS // (count * queries.shape[1]))
        parts = [self._rerank(q, i, k) for q, i in zip(queries.split(rows), ids.split(rows), strict=True)]
        if len(parts) == 1:
            return parts[0]
        return Neighbors(*(torch.cat([getattr(part, name) for part in parts]) for name in ("distances", "tokens", "ids")))

    def _rerank(self, queries: Tensor, ids: Tensor, k: int) -> Neighbors:
        """Exact distances of candidates [n, c]; the first k by (distance, id)."""
        # Ascending ids make the reads sequential, and a stable sort by distance then breaks ties by id.
        ids = ids.sort(dim=1).values
        found = ids >= 0
        rows = ids.clamp(min=0)
        keys = self._keys.gather(rows.flatten()).to(queries.device).float().view(*ids.shape, -1)
        distances = keys.sub_(queries.unsqueeze(1)).square_().sum(2).cpu()
        distances = torch.where(found, distances, torch.inf)
        nearest, order = distances.sort(dim=1, stable=True)
        nearest, order = nearest[:, :k], order[:, :k]
        ids = ids.gather(1, order)
        tokens = self._values.gather(ids.clamp(min=0).flatten()).view(ids.shape).long()
        return Neighbors(nearest, torch.where(ids >= 0, tokens, 0), ids)
