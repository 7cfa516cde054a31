"""What retrieval returns: the one type between searching and the pure mathematics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """The nearest entries of each query, nearest first, ties by entry id.

    ``distances`` [n, k] float32, squared L2; ``tokens`` [n, k] int64, the value of each entry; ``ids`` [n, k] int64,
    entry numbers. A row with fewer than k neighbours is filled up at its end with id -1, token 0 and distance inf.
    """

    distances: Tensor
    tokens: Tensor
    ids: Tensor

    @property
    def found(self) -> Tensor:
        """[n, k] bool: which places hold a neighbour."""
        return self.ids >= 0

    def __len__(self) -> int:
        return self.ids.shape[0]

    def row(self, index: int) -> Neighbors:
        """One row, as a batch of one without the places that hold no neighbour."""
        found = self.found[index]
        return Neighbors(self.distances[index, found][None], self.tokens[index, found][None], self.ids[index, found][None])

    def nearest(self, k: int) -> Neighbors:
        """The first k of each row."""
        return Neighbors(self.distances[:, :k], self.tokens[:, :k], self.ids[:, :k])

    @staticmethod
    def empty(rows: int, k: int = 0) -> Neighbors:
        """No neighbours for any row."""
        return Neighbors(
            torch.full((rows, k), torch.inf), torch.zeros((rows, k), dtype=torch.int64), torch.full((rows, k), -1, dtype=torch.int64)
        )
