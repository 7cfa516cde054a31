"""``generate`` of transformers on one padded batch, with all prompts known beforehand: what a server is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from knnlm.model import HFLanguageModel


def generate(model: HFLanguageModel, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Continue all prompts, padded to the left, by exactly so many most probable tokens."""
    widest = max(map(len, prompts))
    ids = torch.tensor([[0] * (widest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (widest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model._model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    assert out.shape[1] == widest + tokens
