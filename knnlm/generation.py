"""Generating for one prompt, without a server: the plain loop. The server's engine gives the same tokens for many."""

from __future__ import annotations

import random

from transformers.cache_utils import DynamicCache

from knnlm.drawing import sample
from knnlm.errors import InvalidInput
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.sampling import SamplingParams


def generate(
    knn_lm: KNNLanguageModel,
    model: HFLanguageModel,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: SamplingParams | None = None,
    mixture: Mixture | None = None,
) -> str:
    """Continue ``prompt``; returns the completion without it, up to the model's end-of-sequence token.

    ``sampling``: how tokens are drawn (None: always the most probable one). Raises :class:`InvalidInput` if prompt and
    ``max_new_tokens`` exceed the model's context.
    """
    params = (sampling or SamplingParams(temperature=0.0)).validate()
    tokens = knn_lm.tokenizer.encode(prompt)
    if len(tokens) + max_new_tokens > model.context:
        raise InvalidInput(
            "max_new_tokens", f"is {max_new_tokens}; with {len(tokens)} prompt tokens that exceeds the context of {model.context}."
        )
    length, cache, unread = len(tokens), DynamicCache(), list(tokens)
    draws = random.Random(params.seed)
    for _ in range(max_new_tokens):
        mixed = knn_lm.next_token(unread, mixture, cache=cache, before=tokens[: -len(unread)])
        generated = len(tokens) - length
        token = sample(mixed.log_probs[0], params, tokens, draws.random(), generated=generated, base=mixed.lm_log_probs[0])
        if token in model.eos_ids:
            break
        tokens.append(token)
        unread = [token]
    return knn_lm.tokenizer.decode(tokens)[len(knn_lm.tokenizer.decode(tokens[:length])) :]
