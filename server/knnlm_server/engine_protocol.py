"""What the gRPC border asks of a decoding engine, its tokenizer and its datastores. Knows no torch, no gRPC, no implementation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from knnlm_server.sequence import (
    Arrival,
    DatastoreInfo,
    GenerationRequest,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
)


class PromptTokenizer(Protocol):
    """Text to token ids as the datastores' documents have them, and back; safe to use from several threads."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids that the tokenizer knows."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt: with BOS where documents have it, never with EOS."""

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of a piece of text, without any special token."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""

    def token_text(self, token_id: int) -> str:
        """One token for display, special ones by their name."""


class Engine(Protocol):
    """Generates, scores and retrieves for many requests at once, on a thread of its own."""

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer of the model that is served."""

    @property
    def info(self) -> ServerInfo:
        """What is served now, the limits in force and the resolved configuration; known before :meth:`start`."""

    @property
    def working(self) -> bool:
        """Whether it answers: from :meth:`start` to :meth:`stop`, or until something ended it for good."""

    def start(self) -> None:
        """Begin to work; returns when the first request would be answered at full speed."""

    def stop(self) -> None:
        """End at once: running requests raise :class:`~knnlm_server.errors.ShuttingDown`."""

    def stream(self, request: GenerationRequest, interval: float = 0.0) -> AsyncGenerator[list[Arrival], None]:
        """Token events, and one finish event for each sample, as many at a time as there are; closing the generator cancels
        the request. Tokens that come within ``interval`` seconds of the last time wait for others; an end does not.

        The first iteration raises :class:`~knnlm_server.errors.QueueFull` where there is no room to wait and
        :class:`~knnlm_server.errors.DatastoreNotLoaded` for a name that is not known; any raises
        :class:`~knnlm_server.errors.ReadTooSlowly` where events were not taken for too long.
        """

    async def score(self, request: ScoreRequest) -> ScoreResult:
        """Log-probabilities of given tokens; cancelling the task cancels the request."""

    async def retrieve(self, request: RetrieveRequest) -> RetrieveResult:
        """Neighbours of a context; cancelling the task cancels the request."""


class DatastoreAdmin(Protocol):
    """Changes which datastores are served. Methods block (they read files) and may be called from any thread."""

    def load(self, name: str, path: Path, *, make_default: bool = False) -> DatastoreInfo:
        """Serve the datastore at ``path``; raises :class:`~knnlm_server.errors.DatastoreLoaded` for a name that is taken,
        and :class:`~knnlm.errors.StoreError` for a store that can't be opened or does not fit the model."""

    def unload(self, name: str) -> None:
        """Take a datastore out of service; running requests keep it. Raises :class:`DatastoreNotLoaded`."""

    def reload(self, name: str, path: Path | None = None) -> DatastoreInfo:
        """Serve it as it is on disk now (or at another ``path``); running requests keep the one they have."""

    def remove_documents(self, name: str, ids: Sequence[str], where: Mapping[str, str]) -> tuple[int, int]:
        """Remove documents durably; returns how many documents and entries. Raises as
        :func:`knnlm.datastore.removal.remove_documents` does."""
