"""A model that can go on for long, so that something can happen while it does."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.tiny import VOCABULARY, save, tiny_tokenizer

LONG = 4000


def long_model(folder: Path) -> Path:
    """A tiny GPT-2 with room for :data:`LONG` tokens and a short prompt."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=LONG + 100, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    return save(GPT2LMHeadModel(config).eval(), tiny_tokenizer(), folder)
