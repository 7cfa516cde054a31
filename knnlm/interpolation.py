"""The mixture of two distributions in log space. Pure; serving and evaluation both call it, so what is measured is served."""

from __future__ import annotations

import torch
from torch import Tensor


def interpolate(lm_log_probs: Tensor, knn_log_probs: Tensor, weight: Tensor | float) -> Tensor:
    """log(λ p_kNN + (1-λ) p_LM), elementwise: ``logaddexp(log λ + log p_kNN, log(1-λ) + log p_LM)``.

    ``lm_log_probs`` and ``knn_log_probs``: [n] or [n, vocabulary], natural logarithms; ``weight``: λ, one number or
    [n], 0 to 1. A row with λ = 0 is the LM's bit for bit, one with λ = 1 is p_kNN.
    """
    per_row = torch.as_tensor(weight, dtype=torch.float64, device=lm_log_probs.device)
    per_row = per_row.reshape([-1] + [1] * (lm_log_probs.ndim - 1))
    log_weight, log_rest = per_row.log().to(lm_log_probs.dtype), torch.log1p(-per_row).to(lm_log_probs.dtype)
    mixed = torch.logaddexp(log_weight + knn_log_probs.to(lm_log_probs.dtype), log_rest + lm_log_probs)
    return torch.where(per_row == 0, lm_log_probs, mixed)


def interpolate_at(lm_log_probs: Tensor, tokens: Tensor, knn_log_probs: Tensor, weight: Tensor) -> Tensor:
    """:func:`interpolate` where p_kNN is zero for all but some tokens: [n, vocabulary].

    ``tokens`` [n, k] int64 and their ``knn_log_probs`` [n, k]: a token may stand there several times with one value.
    Everything else is (1-λ) p_LM, which needs no logarithm of a sum.
    """
    mixed = lm_log_probs + torch.log1p(-weight).to(lm_log_probs.dtype)[:, None]
    if bool((base := weight == 0).any()):
        mixed[base] = lm_log_probs[base]
    return mixed.scatter_(1, tokens, interpolate(lm_log_probs.gather(1, tokens), knn_log_probs, weight))


def effective_weight(weight: Tensor, found: Tensor) -> Tensor:
    """λ per row [n], 0 where a row has no neighbour at all (``found`` [n, k] bool): there the base LM speaks alone."""
    return torch.where(found.any(dim=1), weight, torch.zeros_like(weight))
