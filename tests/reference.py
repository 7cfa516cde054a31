"""A slow and obvious kNN-LM in NumPy (float64), written from the definition and sharing no code with knnlm.

Windows by their definition, one forward pass per predicted token, brute-force distances, ties by entry id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def context_start(position: int, max_length: int, stride: int) -> int:
    """First token that is read to predict the token at ``position`` (1 or later) of a document."""
    block = position // stride
    return max(0, min((block + 1) * stride - max_length, block * stride - 1))


def key_and_log_probs(hf_model: Any, feed_forward: str, context: Sequence[int]) -> tuple[Floats, Floats]:
    """Input of the module ``feed_forward`` at the last token of ``context``, and log p(next token), both from transformers."""
    seen: list[torch.Tensor] = []
    handle = hf_model.get_submodule(feed_forward).register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    try:
        with torch.no_grad():
            logits = hf_model(torch.tensor([list(context)])).logits[0, -1]
    finally:
        handle.remove()
    scores = logits.double().numpy()
    key = seen[0].reshape(len(context), -1)[-1].double().numpy()
    return key, scores - np.logaddexp.reduce(scores)


@dataclass(frozen=True)
class Scored:
    """What the base LM says about every token but each document's first, in corpus order."""

    keys: Floats
    values: Ints
    log_probs: Floats


def score(hf_model: Any, feed_forward: str, documents: Sequence[Sequence[int]], max_length: int, stride: int) -> Scored:
    """Keys, values and next-token distributions [n, vocabulary] of ``documents``."""
    keys, values, log_probs = [], [], []
    for tokens in documents:
        for position in range(1, len(tokens)):
            start = context_start(position, max_length, stride)
            key, said = key_and_log_probs(hf_model, feed_forward, tokens[start:position])
            keys.append(key)
            values.append(tokens[position])
            log_probs.append(said)
    return Scored(np.array(keys), np.array(values, dtype=np.int64), np.array(log_probs))


def neighbors(query: Floats, keys: Floats, k: int) -> tuple[Floats, Ints]:
    """Squared L2 distances and ids of the k nearest keys, nearest first, ties by smaller id."""
    distances = ((keys - query) ** 2).sum(axis=1)
    order = np.lexsort((np.arange(len(keys)), distances))[:k]
    return distances[order], order


def knn_probabilities(distances: Floats, tokens: Ints, temperature: float, vocabulary: int) -> Floats:
    """p_kNN over the vocabulary: softmax(-d / T), summed by token."""
    scores = -distances / temperature
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    out = np.zeros(vocabulary)
    for weight, token in zip(weights, tokens, strict=True):
        out[token] += weight
    return out


def mixture(lm_log_probs: Floats, knn: Floats, weight: float) -> Floats:
    """log(λ p_kNN + (1-λ) p_LM)."""
    with np.errstate(divide="ignore"):
        result: Floats = np.log(weight * knn + (1 - weight) * np.exp(lm_log_probs))
    return result


def knn_lm_log_probs(
    query: Floats, lm_log_probs: Floats, keys: Floats, values: Ints, *, k: int, temperature: float, weight: float
) -> Floats:
    """The whole of it for one query: log p(y | c) over the vocabulary."""
    if weight == 0 or len(keys) == 0:
        return lm_log_probs
    distances, ids = neighbors(query, keys, k)
    return mixture(lm_log_probs, knn_probabilities(distances, values[ids], temperature, len(lm_log_probs)), weight)
