"""What the gRPC border asks of a decoding engine and its tokenizer. Knows no torch, no gRPC and no implementation."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from knnlm_server.sequence import FinishEvent, GenerationRequest, ScoreRequest, ScoreResult, ServerInfo, TokenEvent


class PromptTokenizer(Protocol):
    """Text to token ids as the datastore's documents have them; safe to use from several threads."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the tokenizer knows."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: with BOS where documents have it, never with EOS."""

    def token_text(self, token_id: int) -> str:
        """One token for display, special ones by their name."""


class Engine(Protocol):
    """Generates and scores for many requests at once, on a thread of its own."""

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the model that is served."""

    @property
    def info(self) -> ServerInfo:
        """What is served, the limits in force and the default mixture; known before :meth:`start`."""

    def start(self) -> None:
        """Begin to work; returns when the first request would be answered at full speed."""

    def stop(self) -> None:
        """End at once: running requests raise :class:`~knnlm_server.errors.ShuttingDown`."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        """Token events, then one finish event; closing the generator cancels the request.

        The first iteration raises :class:`~knnlm_server.errors.QueueFull` where there is no room to wait.
        """

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of given tokens; cancelling the task cancels the request."""
