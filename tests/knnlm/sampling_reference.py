"""Sampling in NumPy (float64), step by step from docs/definition.md: obvious, slow, and sharing no code with knnlm."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from knnlm.sampling import SamplingParams

Floats = npt.NDArray[np.float64]


def probabilities(scores: Floats) -> Floats:
    """Softmax."""
    raised = np.exp(scores - scores.max())
    result: Floats = raised / raised.sum()
    return result


def penalized(log_probs: Floats, params: SamplingParams, tokens: Sequence[int], generated: int) -> Floats:
    """Biases and penalties, a token at a time."""
    scores = log_probs.copy()
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(tokens):
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    completion = list(tokens[len(tokens) - generated :])
    for token in set(completion):
        scores[token] -= completion.count(token) * params.frequency_penalty + params.presence_penalty
    return scores


def forbidden(params: SamplingParams, tokens: Sequence[int], ends: Collection[int]) -> set[int]:
    """Tokens that would complete a bad word, or end the completion too early."""
    words = {word[-1] for word in params.bad_words if tuple(tokens[max(0, len(tokens) - len(word) + 1) :]) == tuple(word[:-1])}
    return words | set(ends)


def kept(scores: Floats, params: SamplingParams) -> Floats:
    """Scores after temperature and truncation, -inf for what is cut; a step sees what the one before left."""
    scores = scores / params.temperature
    if params.top_k:
        scores = np.where(scores >= np.sort(scores)[::-1][min(params.top_k, len(scores)) - 1], scores, -np.inf)
    if params.top_p < 1:
        values, which = np.unique(probabilities(scores), return_inverse=True)
        sums = values * np.bincount(which)
        scores = np.where((sums[::-1].cumsum()[::-1] - sums)[which] < params.top_p, scores, -np.inf)
    if params.min_p > 0:
        left = probabilities(scores)
        scores = np.where(left >= params.min_p * left.max(), scores, -np.inf)
    if params.typical_p < 1:
        scores = typical(scores, params.typical_p)
    return scores


def typical(scores: Floats, mass: float) -> Floats:
    """Those whose information is nearest to the entropy, up to the one with which their sum reaches ``mass``."""
    left = probabilities(scores)
    possible = np.flatnonzero(left)
    information = -np.log(left[possible])
    away = np.abs(information - (left[possible] * information).sum())
    order = np.argsort(away, kind="stable")
    reached = np.cumsum(left[possible][order])
    last = min(int((reached < mass).sum()), len(order) - 1)
    out = np.full_like(scores, -np.inf)
    inside = possible[away <= away[order[last]]]
    out[inside] = scores[inside]
    return out


def draw(scores: Floats, params: SamplingParams, uniform: float) -> int:
    """The first token at which the cumulative probability exceeds ``uniform``."""
    if params.temperature == 0:
        return int(scores.argmax())
    cumulative = np.cumsum(probabilities(kept(scores, params)))
    return int(np.argmax(cumulative > uniform * cumulative[-1]))
