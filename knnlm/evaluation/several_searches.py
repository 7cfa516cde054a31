"""One reading of a text by the LM, and several searches at each of its tokens: what they cost and what they say of the
targets, and how far they are from a reference. Kept is one number for each token, search and k."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.distribution import knn_token_log_probs
from knnlm.errors import CorpusError
from knnlm.evaluation.scoring import ReadBatch, read
from knnlm.neighbors import Neighbors
from knnlm.opening import OpenedKNNLM
from knnlm.retrieval import Retriever
from knnlm.search_measurement import recall, total_variation
from knnlm.tokenized import TokenizedDocument

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Search:
    """A search for the largest of ``ks`` (ascending) neighbours, of which smaller k take the first; ``compared``: with the
    reference, at the largest."""

    retriever: Retriever
    ks: tuple[int, ...]
    compared: bool = False


@dataclass(frozen=True)
class Reference:
    """A search to compare with, at the tokens ``rows`` [m], ascending (it may be slow)."""

    retriever: Retriever
    rows: np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Found:
    """What a search found. ``log_probs`` [ks, n] float32: log p_kNN of each target, NaN where a token has no neighbour;
    ``seconds`` of search and mixing; ``variation`` and ``recall`` at the tokens of the reference."""

    log_probs: Floats
    seconds: float = 0.0
    variation: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """``lm`` [n] float32: log-probability of each target; ``lm_seconds`` that the LM took; what each search found."""

    lm: Floats
    lm_seconds: float
    found: list[Found]


def search_several(
    opened: OpenedKNNLM, documents: Sequence[TokenizedDocument], searches: Sequence[Search], temperature: float, *,
    reference: Reference | None = None, batch_tokens: int = 2048, progress: Callable[[int], None] = lambda done: None,
) -> Reading:  # fmt: skip
    """Read every token but the first of each document, and search. ``temperature`` T of p_kNN.

    ``progress`` is called with the number of tokens read so far. Raises :class:`CorpusError` if there is none.
    """
    tokens = sum(max(len(document.ids) - 1, 0) for document in documents)
    if not tokens:
        raise CorpusError("There is nothing to score: no document has at least two tokens.")
    lm, seconds, done = np.empty(tokens, np.float32), 0.0, 0
    found = [Found(np.empty((len(search.ks), tokens), np.float32)) for search in searches]
    started = time.perf_counter()
    windowing = opened.store.manifest.windowing
    for batch in read(opened.model, (document.ids for document in documents), windowing, batch_tokens=batch_tokens):
        lm[batch.rows.numpy()] = batch.log_probs.gather(1, batch.targets[:, None])[:, 0].numpy()
        seconds += time.perf_counter() - started
        _search_batch(batch, searches, found, temperature, reference)
        done += len(batch.rows)
        progress(done)
        started = time.perf_counter()
    return Reading(lm, seconds, found)


def _search_batch(
    batch: ReadBatch, searches: Sequence[Search], found: Sequence[Found], temperature: float, reference: Reference | None
) -> None:
    places = torch.zeros(0, dtype=torch.int64)
    exact: dict[int, Neighbors] = {}
    if reference is not None:
        places = torch.from_numpy(np.flatnonzero(np.isin(batch.rows.numpy(), reference.rows)))
    for search, into in zip(searches, found, strict=True):
        k, started = search.ks[-1], time.perf_counter()
        neighbors = search.retriever.retrieve(batch.queries, k)
        into.log_probs[:, batch.rows.numpy()] = _target_log_probs(neighbors, search.ks, temperature, batch.targets)
        into.seconds += time.perf_counter() - started
        if reference is not None and search.compared and len(places):
            if k not in exact:
                exact[k] = reference.retriever.retrieve(batch.queries[places], k)
            _compare(neighbors.each(lambda part: part[places]), exact[k], temperature, into)


def _target_log_probs(neighbors: Neighbors, ks: Sequence[int], temperature: float, targets: Tensor) -> Floats:
    """[ks, n]; NaN where nothing was found."""
    log_probs = torch.stack([knn_token_log_probs(neighbors.nearest(k), temperature, targets) for k in ks])
    return torch.where(neighbors.found.any(1), log_probs, torch.nan).numpy()


def _compare(found: Neighbors, exact: Neighbors, temperature: float, into: Found) -> None:
    into.variation += total_variation(found, exact, temperature).tolist()
    into.recall += recall(found, exact).tolist()
