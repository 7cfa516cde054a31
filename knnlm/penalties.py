"""What the text so far does to the next token's log-probabilities: biases, penalties, and tokens that are forbidden. Pure."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from knnlm.sampling import SamplingParams


def penalize(log_probs: Tensor, params: SamplingParams, tokens: Sequence[int], generated: int) -> Tensor:
    """Scores [vocabulary] after logit_bias, repetition_penalty, frequency_penalty and presence_penalty, in that order.

    ``log_probs`` [vocabulary], normalised. ``tokens``: those of prompt and completion so far, of which the last
    ``generated`` are the completion. Nothing becomes impossible by it.
    """
    scores = log_probs[None]
    if params.logit_bias:
        scores = _biases(params.logit_bias, len(log_probs), log_probs.device)(_ids(tokens, log_probs), scores)
    if params.repetition_penalty != 1.0 and tokens:
        scores = RepetitionPenaltyLogitsProcessor(penalty=float(params.repetition_penalty))(_ids(tokens, log_probs), scores)
    if generated and (params.frequency_penalty or params.presence_penalty):
        found, counts = torch.unique(_ids(tokens[-generated:], log_probs), return_counts=True)
        penalties = params.frequency_penalty * counts.double() + params.presence_penalty
        scores = scores.index_add(1, found, penalties[None].to(scores.dtype), alpha=-1)
    return scores[0]


def forbid(scores: Tensor, bad_words: tuple[tuple[int, ...], ...], tokens: Sequence[int], ends: Collection[int]) -> Tensor:
    """``scores`` [vocabulary] with -inf for tokens that would complete one of ``bad_words`` after ``tokens``, and for ``ends``."""
    if bad_words:
        longest = max(map(len, bad_words))
        scores = _bad_words(bad_words, len(scores), scores.device)(_ids(tokens[-longest:], scores), scores[None])[0]
    if ends:
        scores = scores.index_fill(0, torch.tensor(sorted(ends), device=scores.device), -torch.inf)
    return scores


def allowed_scores(
    log_probs: Tensor, base: Tensor, params: SamplingParams, tokens: Sequence[int], generated: int, ends: Collection[int]
) -> Tensor:
    """Scores [vocabulary] after :func:`penalize` and :func:`forbid`, in which at least one token is possible.

    Where what is forbidden is all that ``log_probs`` think possible (at weight 1, where few tokens are), the base model's
    log-probabilities ``base`` [vocabulary] are taken instead; where they leave none either, bad words are let pass, and
    then ``ends``. NaN stays NaN.
    """
    for bad_words, closed in ((params.bad_words, ends), ((), ends), ((), ())):
        for distribution in (log_probs, base):
            scores = forbid(penalize(distribution, params, tokens, generated), bad_words, tokens, closed)
            if not bool((scores == -torch.inf).all()):
                return scores
    return scores


def _ids(tokens: Sequence[int], like: Tensor) -> torch.LongTensor:
    return cast("torch.LongTensor", torch.as_tensor(tokens, dtype=torch.long, device=like.device)[None])


# Kept, since they take longer to make than to use; they hold tensors as wide as the vocabulary.
@functools.lru_cache(maxsize=32)
def _biases(logit_bias: tuple[tuple[int, float], ...], _vocabulary: int, _device: torch.device) -> SequenceBiasLogitsProcessor:
    return SequenceBiasLogitsProcessor([[[token], float(bias)] for token, bias in logit_bias])


@functools.lru_cache(maxsize=32)
def _bad_words(bad_words: tuple[tuple[int, ...], ...], _vocabulary: int, _device: torch.device) -> NoBadWordsLogitsProcessor:
    return NoBadWordsLogitsProcessor([list(word) for word in bad_words])
