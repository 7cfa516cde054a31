"""From neighbours to log-probabilities of the next token. Pure functions; knows neither model nor index.

Khandelwal et al. (2020), section 2: p_kNN(y | c) = Σ over neighbours i with value y of softmax_i(-d_i / T); of several
datastores, softmax_i(-d_i / T + log w) over all of their neighbours. All in log space: a token whose neighbours are far
away keeps its (tiny) probability instead of becoming impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knnlm.neighbors import Neighbors


def log_weights(neighbors: Neighbors, temperature: Tensor | float) -> Tensor:
    """log softmax(-d / T + log w) over the neighbours found: [n, k] float64, -inf where a place holds none.

    ``temperature``: one number or [n], above 0, in units of squared distance. w: the weight of a neighbour's datastore
    where there are several, else 1. A row without any neighbour is all -inf.
    """
    per_row = torch.as_tensor(temperature, dtype=torch.float64, device=neighbors.distances.device).reshape(-1, 1)
    distances = torch.where(neighbors.found, neighbors.distances.double(), torch.inf)
    # Relative to the nearest first, so that no distance and no temperature overflows.
    nearest = distances.topk(min(1, distances.shape[1]), largest=False).values
    scores = torch.where(neighbors.found, (nearest - distances) / per_row, -torch.inf)
    if neighbors.log_priors is not None:
        scores = scores + neighbors.log_priors
    return torch.where(neighbors.found, scores - torch.logsumexp(scores, dim=1, keepdim=True), -torch.inf)


def neighbor_token_log_probs(neighbors: Neighbors, temperature: Tensor | float) -> Tensor:
    """log p_kNN of each neighbour's own token: [n, k] float32; neighbours with one token share one value.

    The weights are added up per token by a segmented log-sum-exp over the row sorted by token: the largest of a segment
    first, then the sum relative to it. -inf where a place holds no neighbour and no other has its token.
    """
    weights = log_weights(neighbors, temperature)
    tokens, order = neighbors.tokens.sort(dim=1)
    weights = weights.gather(1, order)
    segment = torch.zeros_like(tokens)
    segment[:, 1:] = (tokens[:, 1:] != tokens[:, :-1]).cumsum(1)
    largest = torch.full_like(weights, -torch.inf).scatter_reduce_(1, segment, weights, reduce="amax")
    relative = torch.where(weights > -torch.inf, (weights - largest.gather(1, segment)).exp(), 0.0)
    totals = largest + torch.zeros_like(weights).scatter_add_(1, segment, relative).log()
    return torch.empty_like(weights).scatter_(1, order, totals.gather(1, segment)).float()


def knn_log_probs(neighbors: Neighbors, temperature: Tensor | float, vocabulary_size: int) -> Tensor:
    """log p_kNN over the whole vocabulary: [n, vocabulary_size] float32, -inf where no neighbour has the token."""
    return spread(neighbors, neighbor_token_log_probs(neighbors, temperature), vocabulary_size)


def spread(neighbors: Neighbors, token_log_probs: Tensor, vocabulary_size: int) -> Tensor:
    """What :func:`neighbor_token_log_probs` gave, over the whole vocabulary: [n, vocabulary_size], -inf elsewhere."""
    everywhere = torch.full((len(neighbors), vocabulary_size), -torch.inf, device=token_log_probs.device)
    return everywhere.scatter_(1, neighbors.tokens, token_log_probs)


def knn_token_log_probs(neighbors: Neighbors, temperature: Tensor | float, tokens: Tensor) -> Tensor:
    """log p_kNN of one token per row: [n] float32, equal to gathering ``tokens`` [n] from :func:`knn_log_probs`.

    Evaluation needs no more than this; it never makes the dense [n, vocabulary] form.
    """
    same = neighbors.tokens == tokens[:, None]
    return torch.logsumexp(torch.where(same, log_weights(neighbors, temperature), -torch.inf), dim=1).float()


def votes_for(tokens: Tensor, neighbors: Neighbors, votes: Tensor) -> Tensor:
    """:func:`knn_token_log_probs` of ``tokens`` [n] out of what :func:`neighbor_token_log_probs` gave: [n] float32."""
    theirs = torch.where(neighbors.tokens == tokens[:, None], votes, -torch.inf)
    return theirs.max(1).values if theirs.shape[1] else theirs.new_full((len(theirs),), -torch.inf)
