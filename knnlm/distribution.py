"""From neighbours to log-probabilities of the next token. Pure functions; knows neither model nor index.

Khandelwal et al. (2020), section 2: p_kNN(y | c) = Σ over neighbours i with value y of softmax_i(-d_i / T). All in log
space: a token whose neighbours are far away keeps its (tiny) probability instead of becoming impossible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from knnlm.neighbors import Neighbors


def log_weights(neighbors: Neighbors, temperature: Tensor | float) -> Tensor:
    """log softmax(-d / T) over the neighbours found: [n, k] float64, -inf where a place holds none.

    ``temperature``: one number or [n], above 0, in units of squared distance. A row without any neighbour is all -inf.
    """
    per_row = torch.as_tensor(temperature, dtype=torch.float64, device=neighbors.distances.device).reshape(-1, 1)
    distances = torch.where(neighbors.found, neighbors.distances.double(), torch.inf)
    # Relative to the nearest first, so that no distance and no temperature overflows.
    nearest = distances.topk(min(1, distances.shape[1]), largest=False).values
    scores = torch.where(neighbors.found, (nearest - distances) / per_row, -torch.inf)
    return torch.where(neighbors.found, scores - torch.logsumexp(scores, dim=1, keepdim=True), -torch.inf)


def knn_log_probs(neighbors: Neighbors, temperature: Tensor | float, vocabulary_size: int) -> Tensor:
    """log p_kNN over the whole vocabulary: [n, vocabulary_size] float32, -inf where no neighbour has the token.

    A scatter form of log-sum-exp: the largest log-weight of each token first, then the sum relative to it.
    """
    weights = log_weights(neighbors, temperature)
    shape = (weights.shape[0], vocabulary_size)
    largest = torch.full(shape, -torch.inf, dtype=weights.dtype, device=weights.device)
    largest.scatter_reduce_(1, neighbors.tokens, weights, reduce="amax")
    relative = torch.where(weights > -torch.inf, (weights - largest.gather(1, neighbors.tokens)).exp(), 0.0)
    total = torch.zeros_like(largest).scatter_add_(1, neighbors.tokens, relative)
    return (largest + total.log()).float()


def knn_token_log_probs(neighbors: Neighbors, temperature: Tensor | float, tokens: Tensor) -> Tensor:
    """log p_kNN of one token per row: [n] float32, equal to gathering ``tokens`` [n] from :func:`knn_log_probs`.

    Evaluation needs no more than this; it never makes the dense [n, vocabulary] form.
    """
    same = neighbors.tokens == tokens[:, None]
    return torch.logsumexp(torch.where(same, log_weights(neighbors, temperature), -torch.inf), dim=1).float()
