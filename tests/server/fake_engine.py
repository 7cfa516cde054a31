"""An engine without a model: it answers from a script, and tells a test what was done to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from knnlm_server.errors import DatastoreLoaded, DatastoreNotLoaded, ShuttingDown
from knnlm_server.sequence import (
    Alternative,
    Arrival,
    CompletionEvidence,
    DatastoreInfo,
    DocumentWeight,
    FinishEvent,
    FinishReason,
    GenerationRequest,
    Limits,
    NeighborEvidence,
    RetrievalParams,
    RetrieveRequest,
    RetrieveResult,
    ScoreRequest,
    ScoreResult,
    ServerInfo,
    TokenEvent,
    VerbatimRun,
)

DEFAULT_RETRIEVAL = RetrievalParams(weight=0.25, k=16, temperature=10.0)
LIMITS = Limits(
    context=64,
    max_k=32,
    max_alternatives=5,
    max_neighbors=4,
    max_score_tokens=50,
    max_stop_strings=2,
    max_stop_token_ids=3,
    max_text_bytes=100,
    max_samples=4,
    max_logit_biases=3,
    max_bad_words=2,
    max_datastores=2,
    max_seconds=60.0,
)
MAIN = DatastoreInfo(
    name="main",
    fingerprint="s1",
    entries=1000,
    documents=10,
    index="Flat",
    key_layer="last_ffn_input",
    key_dimension=8,
    distance="exact",
    default_retrieval=DEFAULT_RETRIEVAL,
    defaults_source="profile",
)
OTHER = replace(
    MAIN, name="other", fingerprint="s2", entries=50, default_retrieval=RetrievalParams(0.5, 8, 20.0), defaults_source="defaults"
)
# Its distances are of another kind, so it can't be mixed with the first two.
FOREIGN = replace(MAIN, name="foreign", fingerprint="s3", distance="index")
INFO = ServerInfo(
    version="0.1.0",
    model="tiny",
    model_fingerprint="m1",
    tokenizer_fingerprint="t1",
    vocabulary_size=257,
    datastores=(MAIN, OTHER, FOREIGN),
    limits=LIMITS,
    settings={"device": "cpu"},
)
NEIGHBOR = NeighborEvidence(
    entry=7,
    token_id=98,
    text="b",
    weight=0.75,
    distance=1.5,
    document_id="d1",
    source="docs/a.txt",
    character_start=10,
    character_end=11,
    line=3,
    left_context="before\n it",
    datastore="main",
    metadata={"title": "On bytes"},
)
EVIDENCE = CompletionEvidence(
    changed_share=0.5,
    searched_tokens=2,
    documents=(DocumentWeight("main", "d1", "docs/a.txt", 1.25), DocumentWeight("other", "d2", "", 0.5)),
    verbatim=VerbatimRun(0, 2, "ab", "main", "d1", "docs/a.txt", 10, 12, 3),
)


class ByteTokenizer:
    """A token for each UTF-8 byte, and 256, which is special; ``bos`` is put before every prompt."""

    vocabulary_size = 257

    def __init__(self, bos: int | None = None) -> None:
        self.bos = bos

    def encode(self, text: str) -> list[int]:
        ids = list(text.encode())
        return ids if self.bos is None else [self.bos, *ids]

    def encode_plain(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")

    def token_text(self, token_id: int) -> str:
        return "<bos>" if token_id == self.bos else chr(token_id)


class FakeEngine:
    """Generates ``pieces`` for every request, and for each of its samples.

    ``hold_after``: after so many tokens it waits for :meth:`release`. ``failure``: raised instead of the first token of
    prompts that begin with "fail". ``closed`` is set once a generator has ended in any way.
    """

    def __init__(
        self,
        pieces: Sequence[str] = ("a", "b"),
        *,
        hold_after: int | None = None,
        failure: Exception | None = None,
        limits: Limits = LIMITS,
        bos: int | None = None,
    ) -> None:
        self.tokenizer = ByteTokenizer(bos)
        self.info = replace(INFO, limits=limits)
        self.pieces = pieces
        self.hold_after = hold_after
        self.failure = failure
        self.requests: list[GenerationRequest] = []
        self.intervals: list[float] = []
        self.scored: list[ScoreRequest] = []
        self.retrieved: list[RetrieveRequest] = []
        self.started = False
        self.stopped = False
        self.broken = False
        self.released = False
        self.closed = threading.Event()
        self._holding: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    @property
    def working(self) -> bool:
        return self.started and not self.stopped and not self.broken

    def start(self) -> None:
        self.started = True

    def stop(self) -> None:
        self.stopped = True
        self._wake()

    def release(self) -> None:
        self.released = True
        self._wake()

    async def stream(self, request: GenerationRequest, interval: float = 0.0) -> AsyncGenerator[list[Arrival], None]:
        """Each event by itself, whatever the interval is."""
        self.intervals.append(interval)
        self.requests.append(request)
        try:
            self._fail_if_asked(request.prompt)
            for index, piece in enumerate(self.pieces):
                if index == self.hold_after:
                    await self._hold()
                for sample in range(request.samples):
                    yield _now(replace(_token(request, index, piece), sample=sample))
            for sample in range(request.samples):
                # Later samples are better.
                mean = float(sample - request.samples) if request.mean_log_prob else None
                evidence = EVIDENCE if request.detail.evidence else None
                yield _now(FinishEvent(FinishReason.LENGTH, "!", len(request.prompt), len(self.pieces), sample, evidence, mean))
        finally:
            self.closed.set()

    async def score(self, request: ScoreRequest) -> ScoreResult:
        self.scored.append(request)
        self._fail_if_asked(request.tokens)
        count = len(request.tokens) - 1
        return ScoreResult((-1.0,) * count, (-2.0,) * count, (float("-inf"),) * count)

    async def retrieve(self, request: RetrieveRequest) -> RetrieveResult:
        self.retrieved.append(request)
        self._fail_if_asked(request.tokens)
        return RetrieveResult((NEIGHBOR,) * request.neighbors)

    def _fail_if_asked(self, tokens: Sequence[int]) -> None:
        if self.failure is not None and tuple(tokens[:4]) == tuple(b"fail"):
            raise self.failure

    async def _hold(self) -> None:
        woken = asyncio.Event()
        self._holding.append((asyncio.get_running_loop(), woken))
        if not (self.released or self.stopped):
            await woken.wait()
        if self.stopped:
            raise ShuttingDown("The server is being stopped.")

    def _wake(self) -> None:
        for loop, woken in self._holding:
            loop.call_soon_threadsafe(woken.set)


def _now(event: TokenEvent | FinishEvent) -> list[Arrival]:
    return [Arrival(time.monotonic(), event)]


def _token(request: GenerationRequest, index: int, piece: str) -> TokenEvent:
    detail = request.detail
    event = TokenEvent(index=index, token_id=ord(piece[0]), text=piece, token_text=piece)
    if detail.log_probs:
        event = replace(event, log_prob=-0.5, lm_log_prob=-1.5, knn_log_prob=float("-inf"), knn_share=0.0 if index else 0.8)
        event = replace(event, interpolation_weight=request.retrieval.weight)
    return replace(
        event,
        alternatives=(_alternative(detail.log_probs),) * detail.alternatives,
        neighbors=(NEIGHBOR,) * detail.neighbors,
    )


def _alternative(log_probs: bool) -> Alternative:
    return Alternative(97, "a", -0.5, -1.5, float("-inf")) if log_probs else Alternative(97, "a", -0.5)


class FakeAdmin:
    """Datastores by name that were "opened" at a path; ``removed`` keeps what was asked to be removed."""

    def __init__(self, **stores: Path) -> None:
        self.stores = dict(stores)
        self.default: str | None = next(iter(stores), None)
        self.removed: list[tuple[str, tuple[str, ...], dict[str, str]]] = []

    def load(self, name: str, path: Path, *, make_default: bool = False) -> DatastoreInfo:
        if name in self.stores:
            raise DatastoreLoaded(f"A datastore {name!r} is loaded already.")
        self.stores[name] = path
        if make_default or self.default is None:
            self.default = name
        return replace(MAIN, name=name)

    def unload(self, name: str) -> None:
        self._require(name)
        del self.stores[name]

    def reload(self, name: str, path: Path | None = None) -> DatastoreInfo:
        self._require(name)
        self.stores[name] = path or self.stores[name]
        return replace(MAIN, name=name, fingerprint="reloaded")

    def remove_documents(self, name: str, ids: Sequence[str], where: Mapping[str, str]) -> tuple[int, int]:
        self._require(name)
        self.removed.append((name, tuple(ids), dict(where)))
        return len(ids), 10 * len(ids)

    def _require(self, name: str) -> None:
        if name not in self.stores:
            raise DatastoreNotLoaded(f"No datastore {name!r} is loaded.")
