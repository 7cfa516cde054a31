"""What retrieval returns: the one type between searching and the pure mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """The nearest entries of each query, nearest first, ties by entry id.

    ``distances`` [n, k] float32, squared L2; ``tokens`` [n, k] int64, the value of each entry; ``ids`` [n, k] int64,
    entry numbers. A row with fewer than k neighbours is filled up at its end with id -1, token 0 and distance inf.

    Of several datastores (:mod:`knnlm.datastore_mix`, which says in what order): ``stores`` [n, k] int64, the number of
    the one that each neighbour is from, -1 where there is none; ``log_priors`` [n, k] float64, log w of that datastore,
    relative to the largest of the row. Each is None where all are from one.
    """

    distances: Tensor
    tokens: Tensor
    ids: Tensor
    stores: Tensor | None = None
    log_priors: Tensor | None = None

    @property
    def found(self) -> Tensor:
        """[n, k] bool: which places hold a neighbour."""
        return self.ids >= 0

    def __len__(self) -> int:
        return self.ids.shape[0]

    def row(self, index: int) -> Neighbors:
        """One row, as a batch of one without the places that hold no neighbour."""
        found = self.found[index]
        return self.each(lambda part: part[index, found][None])

    def nearest(self, k: int) -> Neighbors:
        """The first k of each row."""
        return self.each(lambda part: part[:, :k])

    def each(self, change: Callable[[Tensor], Tensor]) -> Neighbors:
        """The same change made to every part."""
        parts = (self.distances, self.tokens, self.ids, self.stores, self.log_priors)
        return Neighbors(*(None if part is None else change(part) for part in parts))  # type: ignore[arg-type]

    @staticmethod
    def empty(rows: int, k: int = 0) -> Neighbors:
        """No neighbours for any row."""
        return Neighbors(
            torch.full((rows, k), torch.inf), torch.zeros((rows, k), dtype=torch.int64), torch.full((rows, k), -1, dtype=torch.int64)
        )
