"""How far retrieval follows a document: the longest context that a row shares with one of its nearest neighbours.

A row of its own, without memory of earlier steps: where the last tokens that the LM has read are the tokens before a
neighbour, retrieval has been following that document for as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.neighbors import Neighbors

FOLLOWED_TOKENS = 16
FOLLOWED_NEIGHBORS = 8


def context_of(tokens: Sequence[int]) -> list[int]:
    """The last of ``tokens``, 16 of them, -1 in front where there are fewer: what :func:`followed_lengths` takes of one row."""
    last = list(tokens[-FOLLOWED_TOKENS:])
    return [-1] * (FOLLOWED_TOKENS - len(last)) + last


def contexts_of(tokens: Tensor) -> Tensor:
    """:func:`context_of` at each column of ``tokens`` [n, length] int64 with all tokens up to it: [n, length, 16] int64."""
    return torch.nn.functional.pad(tokens, (FOLLOWED_TOKENS - 1, 0), value=-1).unfold(1, FOLLOWED_TOKENS, 1)


def followed_lengths(contexts: Tensor, neighbors: Neighbors, store: Datastore) -> Tensor:
    """Tokens of context that each row shares with one of its 8 nearest neighbours, 0 to 16: [n] int64.

    ``contexts`` [n, 16] int64: the last tokens that the LM has read, the newest last, -1 where there are no more;
    ``neighbors`` [n, k] of ``store``.
    """
    lengths = followed_by_each(contexts, neighbors, store)
    return lengths.max(1).values if lengths.shape[1] else torch.zeros(len(contexts), dtype=torch.int64)


def followed_by_each(contexts: Tensor, neighbors: Neighbors, store: Datastore) -> Tensor:
    """What :func:`followed_lengths` takes the largest of: [n, min(k, 8)] int64, 0 where a place holds no neighbour."""
    ids = neighbors.ids[:, :FOLLOWED_NEIGHBORS]
    before = store.left_contexts(ids.clamp(min=0).flatten(), FOLLOWED_TOKENS).view(*ids.shape, FOLLOWED_TOKENS)
    same = (before == contexts[:, None, :]) & (before >= 0) & (ids >= 0)[:, :, None]
    # From the newest back to the first that differs.
    return same.flip(2).long().cumprod(2).sum(2)
