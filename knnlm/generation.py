"""Generating for one prompt, without a server: the plain loop. The server's engine gives the same tokens for many."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

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
    tokens = knn_lm.tokenizer.encode(prompt)
    generated = list(generate_tokens(knn_lm, model, tokens, max_new_tokens=max_new_tokens, sampling=sampling, mixture=mixture))
    return knn_lm.tokenizer.decode([*tokens, *generated])[len(knn_lm.tokenizer.decode(tokens)) :]


def generate_tokens(
    knn_lm: KNNLanguageModel,
    model: HFLanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    mixture: Mixture | None = None,
) -> Iterator[int]:
    """The tokens that :func:`generate` draws after the token ids of ``prompt``, one by one, without the one that ends them."""
    params = (sampling or SamplingParams(temperature=0.0)).validate()
    if len(prompt) + max_new_tokens > model.context:
        raise InvalidInput(
            "max_new_tokens", f"is {max_new_tokens}; with {len(prompt)} prompt tokens that exceeds the context of {model.context}."
        )
    tokens, cache, unread = list(prompt), DynamicCache(), list(prompt)
    draws = random.Random(params.seed)
    for generated in range(max_new_tokens):
        mixed = knn_lm.next_token(unread, mixture, cache=cache, before=tokens[: -len(unread)])
        token = sample(mixed.log_probs[0], params, tokens, draws.random(), generated=generated, base=mixed.lm_log_probs[0])
        if token in model.eos_ids:
            break
        yield token
        tokens.append(token)
        unread = [token]
