"""Log-probabilities of given tokens: by the LM, by the neighbours, and by their mixture.

Windows are those of building, so a query here is what a key was there. The server's ``Score`` and ``knnlm compare``
are this one loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.following import contexts_of
from knnlm.knn_lm import KNNLanguageModel, mix_targets
from knnlm.mixture import Mixture
from knnlm.model import LanguageModel
from knnlm.neighbors import Neighbors
from knnlm.windows import PlacedWindow, Window, Windowing, length_batches, windows

IntArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class ReadBatch:
    """One batch of windows as the LM reads it. ``rows`` [n] int64: the place of each target among all tokens; ``targets``
    [n] int64; ``log_probs`` [n, vocabulary] float32, the LM's; ``queries`` [n, dimension] float32; ``contexts`` [n, 16] int64,
    the last tokens that the LM has read, the newest last, -1 where its window has no more."""

    rows: Tensor
    targets: Tensor
    log_probs: Tensor
    queries: Tensor
    contexts: Tensor


@dataclass(frozen=True)
class ScoredBatch:
    """One batch of windows. ``rows`` [n]: the place of each scored token among all; log-probabilities [n] float32, natural.

    ``weight`` [n] float64: the λ that was used; ``searched`` [n] bool: whether neighbours were searched at all. ``read``: what
    the LM read. ``lm_seconds``, ``search_seconds``, ``mix_seconds``: wall time of the LM, of search and re-ranking, and of mixing.
    """

    rows: Tensor
    lm_log_probs: Tensor
    knn_log_probs: Tensor
    log_probs: Tensor
    weight: Tensor
    searched: Tensor
    neighbors: Neighbors
    read: ReadBatch
    lm_seconds: float
    search_seconds: float
    mix_seconds: float


def score(
    knn_lm: KNNLanguageModel,
    documents: Iterable[IntArray],
    windowing: Windowing,
    mixture: Mixture | None = None,
    *,
    batch_tokens: int = 2048,
) -> Iterator[ScoredBatch]:
    """Score every token but the first of each document (1-D arrays of token ids), batch by batch.

    ``mixture``: None takes that of ``knn_lm``, with its gate where it has one. Rows are numbered in document order:
    document 0's token 1 is row 0. Batches hold windows of one length.
    """
    started = time.perf_counter()
    for batch in read(knn_lm.model, documents, windowing, batch_tokens=batch_tokens):
        times = [started, time.perf_counter()]
        settings, weights = knn_lm.settings(batch.log_probs, mixture, batch.contexts)
        looked = time.perf_counter() - times[1]
        neighbors = knn_lm.retriever.retrieve(batch.queries, torch.where(weights.searched, settings.k, 0))
        times.append(time.perf_counter())
        scored = mix_targets(batch.log_probs, batch.targets, neighbors, temperature=settings.temperature, weights=weights)
        times.append(time.perf_counter())
        lm, search, mix = (after - before for before, after in pairwise(times))
        yield ScoredBatch(batch.rows, *scored, weights.searched, neighbors, batch, lm, search - looked, mix + looked)
        started = time.perf_counter()


def read(model: LanguageModel, documents: Iterable[IntArray], windowing: Windowing, *, batch_tokens: int = 2048) -> Iterator[ReadBatch]:
    """Read every token but the first of each document as a target, batch by batch; rows as :func:`score` numbers them."""
    return read_windows(model, ((tokens, windows(len(tokens), windowing)) for tokens in documents), batch_tokens=batch_tokens)


def read_windows(
    model: LanguageModel, documents: Iterable[tuple[IntArray, Iterable[Window]]], *, batch_tokens: int = 2048
) -> Iterator[ReadBatch]:
    """Read the windows that stand with each document, batch by batch; rows number their targets in the order of the windows."""
    stream = _Stream(documents)
    for batch in length_batches(stream.place(), batch_tokens):
        yield _read_batch(model, stream, batch)
        stream.forget(batch)


class _Stream:
    """Documents on their way through windows; each is held until its last window was scored."""

    def __init__(self, documents: Iterable[tuple[IntArray, Iterable[Window]]]) -> None:
        self._documents = documents
        self._held: dict[int, tuple[IntArray, int]] = {}

    def place(self) -> Iterator[PlacedWindow]:
        """Windows with the document's number as ``origin``."""
        row = 0
        for number, (tokens, chosen) in enumerate(self._documents):
            placed = list(chosen)
            if placed:
                self._held[number] = (tokens, len(placed))
            for window in placed:
                yield PlacedWindow(window, number, row)
                row += window.target_count

    def tokens(self, item: PlacedWindow) -> Tensor:
        """The window's tokens, targets included: [input_length + 1] int64."""
        document = self._held[item.origin][0]
        return torch.from_numpy(document[item.window.start : item.window.end].astype(np.int64))

    def forget(self, batch: list[PlacedWindow]) -> None:
        """Count down the windows that are left of each document."""
        for item in batch:
            tokens, left = self._held.pop(item.origin)
            if left > 1:
                self._held[item.origin] = (tokens, left - 1)


def _read_batch(model: LanguageModel, stream: _Stream, batch: list[PlacedWindow]) -> ReadBatch:
    tokens = torch.stack([stream.tokens(item) for item in batch])
    # Windows of one length differ in how many of their last columns are targets; logits are made for the widest.
    widest = max(item.window.target_count for item in batch)
    length = tokens.shape[1] - 1
    columns = torch.arange(length - widest, length)
    is_target = torch.stack([torch.arange(widest) >= widest - item.window.target_count for item in batch])
    out = model.forward(tokens[:, :-1].to(model.device), columns=columns.to(model.device))
    assert out.logits is not None
    rows = torch.cat([torch.arange(item.row, item.row + item.window.target_count) for item in batch])
    return ReadBatch(
        rows,
        tokens[:, 1 + length - widest :][is_target],
        out.logits.float().log_softmax(-1).cpu()[is_target],
        out.keys[:, columns.to(model.device)].float().cpu()[is_target],
        contexts_of(tokens[:, :-1])[:, columns][is_target],
    )
