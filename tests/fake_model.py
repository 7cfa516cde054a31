"""A causal model that needs no torch modules: keys come from a recurrence over tokens. Light, for builds that are killed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from knnlm.model import KeyLayer, ModelFingerprint, ModelOutput
from knnlm.tokenization import BosMode, TextTokenizer
from tests.tiny import CONTEXT, VOCABULARY, tiny_tokenizer

DIMENSION = 8


class FakeModel:
    """As much of a :class:`~knnlm.model.LanguageModel` as building needs; keys depend on all tokens before, and on no batch."""

    name, dtype, context, vocabulary_size, key_dimension = "fake", "float32", CONTEXT, VOCABULARY, DIMENSION
    key_layer = KeyLayer("last_hidden", "recurrence", True)
    fingerprint = ModelFingerprint("c" * 32, "t" * 32, "w" * 32)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self._embedding = torch.randn(VOCABULARY, DIMENSION, generator=torch.Generator().manual_seed(0))

    @cached_property
    def _tokenizer(self) -> Any:
        return tiny_tokenizer()

    def tokenizer(self, bos: BosMode = "auto", eos: bool = False) -> TextTokenizer:
        return TextTokenizer(self._tokenizer, bos, eos)

    def forward(self, tokens: Tensor, *, logits: bool = True, **_: object) -> ModelOutput:
        assert not logits
        state = torch.zeros(len(tokens), DIMENSION)
        states = []
        for column in tokens.T:
            state = torch.tanh(0.7 * state + self._embedding[column])
            states.append(state)
        return ModelOutput(None, torch.stack(states, dim=1))


def load_fake_model() -> FakeModel:
    """As worker processes load it."""
    return FakeModel()
