"""Several datastores in one mixture: k neighbours from each, and one softmax over their union of -d/T + log w.

Knows datastores by number, how each is searched and how much its neighbours count; not what lies in them. Whether they
may be mixed at all is a question to :mod:`knnlm.datastore.fitting`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from knnlm.distribution import log_weights
from knnlm.errors import InvalidInput
from knnlm.neighbors import Neighbors


class NeighborSource(Protocol):
    """Finds neighbours; a :class:`~knnlm.retrieval.Retriever`, or several of them as one."""

    def retrieve(self, queries: Tensor, k: Tensor | int) -> Neighbors:
        """Neighbours of ``queries`` [n, d], ``k`` one number or [n] int64 (0: none for that row)."""


@dataclass(frozen=True)
class StoreShare:
    """One datastore of a batch: its ``number``, by which neighbours name it, and its ``weights`` w [n] float64, one for
    each row (0: the row does not use it)."""

    number: int
    source: NeighborSource
    weights: Tensor


class StoreMix:
    """Datastores and their weights, the same for every row: itself a :class:`NeighborSource`, numbered in order."""

    def __init__(self, sources: Sequence[NeighborSource], weights: Sequence[float]) -> None:
        for number, weight in enumerate(weights):
            if not 0 < weight < math.inf:
                raise InvalidInput(f"weights[{number}]", f"is {weight}, but must be above 0, and finite.")
        self._shares = list(zip(sources, weights, strict=True))

    def retrieve(self, queries: Tensor, k: Tensor | int) -> Neighbors:
        """``k`` neighbours from each datastore, see :func:`retrieve_union`."""
        rows = len(queries)
        shares = [
            StoreShare(number, source, torch.full((rows,), weight, dtype=torch.float64))
            for number, (source, weight) in enumerate(self._shares)
        ]
        return retrieve_union(queries, torch.as_tensor(k).expand(rows), shares)


def retrieve_union(queries: Tensor, k: Tensor, shares: Sequence[StoreShare]) -> Neighbors:
    """``k`` [n] neighbours of each query [n, d] from each of the datastores that its row uses, as one.

    One search for each datastore, of all rows that use it. In a row: by number of datastore, then nearest first, without
    gaps; :func:`heaviest_first` orders them once a temperature is known. What a row finds depends on that row alone.
    """
    used = [share for share in sorted(shares, key=lambda share: share.number) if bool(((share.weights > 0) & (k > 0)).any())]
    if not used:
        return Neighbors.empty(len(queries))
    weights = torch.stack([share.weights for share in used])
    found = [_numbered(share.source.retrieve(queries, torch.where(share.weights > 0, k, 0)), share.number) for share in used]
    if int((weights > 0).sum(0).max()) < 2:
        return found[0] if len(found) == 1 else _joined(found)
    # Relative to the row's largest, so that a datastore alone has exactly 0 whatever its weight is.
    priors = weights.log()
    priors = torch.where(weights > 0, priors - priors.max(0).values, 0.0)
    return _joined([_with_prior(part, prior) for part, prior in zip(found, priors, strict=True)])


def heaviest_first(neighbors: Neighbors, temperature: Tensor | float) -> Neighbors:
    """Neighbours by their share of p_kNN at ``temperature`` ([n] or one number), the largest first; equal ones stay in order.

    Of one datastore they are so already. Equal ones are in the order of :func:`retrieve_union`: by number of datastore.
    """
    if neighbors.log_priors is None:
        return neighbors
    lightest = torch.finfo(torch.float64).min
    # A neighbour whose share underflows still stands before the places that hold none.
    shares = torch.where(neighbors.found, log_weights(neighbors, temperature).clamp(min=lightest), -torch.inf)
    order = shares.sort(dim=1, descending=True, stable=True).indices
    return neighbors.each(lambda part: part.gather(1, order))


def _numbered(found: Neighbors, number: int) -> Neighbors:
    return Neighbors(found.distances, found.tokens, found.ids, torch.where(found.found, number, -1))


def _with_prior(found: Neighbors, prior: Tensor) -> Neighbors:
    return Neighbors(found.distances, found.tokens, found.ids, found.stores, prior[:, None].expand(found.ids.shape))


def _joined(found: Sequence[Neighbors]) -> Neighbors:
    """Side by side, places that hold none at the end, as wide as the fullest row."""
    sides = [[part.distances, part.tokens, part.ids, part.stores, part.log_priors] for part in found]
    joined = Neighbors(*(None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*sides, strict=True)))  # type: ignore[arg-type]
    order = (~joined.found).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(joined.found.sum(1).max())]
    return joined.each(lambda part: part.gather(1, order))
