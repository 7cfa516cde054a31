"""The most probable token of base LM and mixture, without ever making the mixture over the vocabulary.

A token that no neighbour has keeps its order among those: the mixture's best token is the LM's best, or a neighbour's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.distribution import log_weights
from knnlm.interpolation import interpolate
from knnlm.neighbors import Neighbors

SCRATCH_FLOATS = 1 << 22


@dataclass(frozen=True)
class BestTokens:
    """Of n rows, each [n]: the most probable token of the LM, int64, and its ``lm_log_probs`` float32; the same of the mixture."""

    lm: Tensor
    lm_log_probs: Tensor
    mixed: Tensor
    log_probs: Tensor


def best_tokens(lm_log_probs: Tensor, neighbors: Neighbors, temperature: float, weight: Tensor) -> BestTokens:
    """Of ``lm_log_probs`` [n, vocabulary] alone and mixed with ``neighbors`` [n, k] at ``temperature`` and λ ``weight`` [n].

    The smallest id among equals of the LM; a neighbour's token only where it is more probable than the LM's best.
    """
    # NumPy's argmax reads memory once; torch's is several times slower on CPU.
    lm = torch.from_numpy(lm_log_probs.numpy().argmax(1))
    of_lm = lm_log_probs.gather(1, lm[:, None])[:, 0]
    if neighbors.ids.shape[1] == 0:
        return BestTokens(lm, of_lm, lm, of_lm)
    votes = token_votes(neighbors, temperature, lm_log_probs.shape[1]).log()
    mixed = interpolate(lm_log_probs.gather(1, neighbors.tokens), votes, weight)
    most = torch.where(neighbors.found, mixed, -torch.inf).max(1)
    without = interpolate(of_lm, torch.full_like(of_lm, -torch.inf), weight)
    of_neighbor = most.values > without
    best = torch.where(of_neighbor, neighbors.tokens.gather(1, most.indices[:, None])[:, 0], lm)
    return BestTokens(lm, of_lm, best, torch.where(of_neighbor, most.values, without))


def token_votes(neighbors: Neighbors, temperature: float, vocabulary_size: int) -> Tensor:
    """p_kNN of each neighbour's token: [n, k] float32.

    Summed in place of the token in a few rows over the vocabulary, which are used again and again: no sorting, and memory
    that no batch changes.
    """
    weights = log_weights(neighbors, temperature).exp().float()
    votes = torch.empty_like(weights)
    rows = max(1, SCRATCH_FLOATS // vocabulary_size)
    scratch = torch.zeros(min(rows, len(weights)), vocabulary_size)
    for start in range(0, len(weights), rows):
        tokens, of = neighbors.tokens[start : start + rows], weights[start : start + rows]
        totals = scratch[: len(tokens)].scatter_add_(1, tokens, of)
        votes[start : start + rows] = totals.gather(1, tokens)
        totals.scatter_(1, tokens, 0.0)
    return votes
