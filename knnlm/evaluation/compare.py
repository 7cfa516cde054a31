"""``compare``: base LM and kNN-LM over the same tokens, with standard errors, bits per byte and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.errors import CorpusError
from knnlm.evaluation.overlap import ngram_overlap
from knnlm.evaluation.scoring import score
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.tokenized import TokenizedDocument

FEWEST_DOCUMENT_CLUSTERS = 20
TOKENS_PER_CLUSTER = 256

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Perplexity:
    """``value`` = exp(mean negative log-likelihood) with its ``standard_error`` (delta method over clusters of tokens);
    ``bits_per_byte`` over the bytes of scored text (None for token input); ``tokens_per_second`` scored, wall time."""

    value: float
    standard_error: float
    bits_per_byte: float | None
    tokens_per_second: float


@dataclass(frozen=True)
class PerToken:
    """One row for each scored token, in document order: ``doc`` int32, ``position`` int64 within the document,
    ``token_id`` int32, ``lm_logprob``, ``knn_logprob`` (-inf: not among the neighbours) and ``logprob`` of the mixture,
    float32, natural logarithm."""

    doc: np.ndarray[Any, np.dtype[np.int32]]
    position: np.ndarray[Any, np.dtype[np.int64]]
    token_id: np.ndarray[Any, np.dtype[np.int32]]
    lm_logprob: FloatArray
    knn_logprob: FloatArray
    logprob: FloatArray


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found.

    ``change``: relative change of perplexity, below 0 where the kNN-LM is better, and ``change_standard_error`` of the
    paired difference; ``better``, ``worse``: shares of tokens that became more, or less, probable; ``overlap``: share of
    13-token sequences of the text that stand in the datastore; ``clusters``: what the standard errors count as
    independent (``documents``, or ``blocks of 256 tokens`` where there are fewer than 20 documents).
    """

    documents: int
    tokens: int
    mixture: Mixture
    base: Perplexity
    knn: Perplexity
    change: float
    change_standard_error: float
    better: float
    worse: float
    overlap: float
    clusters: str
    per_token: PerToken


def compare(
    knn_lm: KNNLanguageModel,
    store: Datastore,
    documents: Iterable[TokenizedDocument],
    *,
    mixture: Mixture | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Score ``documents`` with the base LM and the mixture, windows as the store was built with.

    ``progress`` is called with the number of tokens scored so far. Raises :class:`CorpusError` if no token can be
    scored.
    """
    applied = (mixture or knn_lm.mixture).validate()
    held = list(documents)
    tokens = sum(max(len(document.ids) - 1, 0) for document in held)
    if not tokens:
        raise CorpusError("There is nothing to compare: no document has at least two tokens.")
    lm, knn, mixed = (np.empty(tokens, np.float32) for _ in range(3))
    lm_seconds = knn_seconds = 0.0
    done = 0
    for batch in score(knn_lm, (document.ids for document in held), store.manifest.windowing, mixture, batch_tokens=batch_tokens):
        rows = batch.rows.numpy()
        lm[rows], knn[rows], mixed[rows] = batch.lm_log_probs.numpy(), batch.knn_log_probs.numpy(), batch.log_probs.numpy()
        lm_seconds, knn_seconds = lm_seconds + batch.lm_seconds, knn_seconds + batch.search_seconds + batch.mix_seconds
        done += len(rows)
        progress(done)
    per_token = _per_token(held, lm, knn, mixed)
    clusters, names = _clusters(per_token)
    byte_counts = [document.scored_bytes() for document in held]
    scored_bytes = None if None in byte_counts else sum(count or 0 for count in byte_counts)
    base = _perplexity(lm, clusters, scored_bytes, tokens / lm_seconds)
    with_knn = _perplexity(mixed, clusters, scored_bytes, tokens / (lm_seconds + knn_seconds))
    change = with_knn.value / base.value
    return Comparison(
        documents=len(held),
        tokens=tokens,
        mixture=applied,
        base=base,
        knn=with_knn,
        change=change - 1,
        change_standard_error=change * _standard_error(lm - mixed, clusters),
        better=float((mixed > lm).mean()),
        worse=float((mixed < lm).mean()),
        overlap=ngram_overlap((document.ids for document in held), store.tokens, store.live_token_ranges()),
        clusters=names,
        per_token=per_token,
    )


def _per_token(documents: list[TokenizedDocument], lm: FloatArray, knn: FloatArray, mixed: FloatArray) -> PerToken:
    lengths = [len(document.ids) for document in documents]
    return PerToken(
        doc=np.repeat(np.arange(len(documents), dtype=np.int32), [max(n - 1, 0) for n in lengths]),
        position=np.concatenate([np.arange(1, n, dtype=np.int64) for n in lengths]),
        token_id=np.concatenate([document.ids[1:] for document in documents]),
        lm_logprob=lm,
        knn_logprob=knn,
        logprob=mixed,
    )


def _clusters(per_token: PerToken) -> tuple[np.ndarray[Any, Any], str]:
    """Tokens of one text are not independent; their losses are added up by document, or by block where documents are few."""
    if len(np.unique(per_token.doc)) >= FEWEST_DOCUMENT_CLUSTERS:
        return np.unique(per_token.doc, return_inverse=True)[1], "documents"
    blocks = np.stack([per_token.doc.astype(np.int64), per_token.position // TOKENS_PER_CLUSTER], axis=1)
    return np.unique(blocks, axis=0, return_inverse=True)[1].reshape(-1), f"blocks of {TOKENS_PER_CLUSTER} tokens"


def _perplexity(log_probs: FloatArray, clusters: np.ndarray[Any, Any], scored_bytes: int | None, rate: float) -> Perplexity:
    loss = -float(log_probs.mean(dtype=np.float64))
    value = _exp(loss)
    bits = loss * len(log_probs) / math.log(2)
    return Perplexity(value, value * _standard_error(log_probs, clusters), bits / scored_bytes if scored_bytes else None, rate)


def _exp(loss: float) -> float:
    """exp, infinite where a token was given no probability at all (weight 1)."""
    return math.exp(loss) if loss < 700 else math.inf


def _standard_error(values: FloatArray, clusters: np.ndarray[Any, Any]) -> float:
    """Standard error of the mean of ``values`` over clusters of unequal size (linearised ratio estimator)."""
    if not np.isfinite(values).all():
        return math.nan
    sizes = np.bincount(clusters)
    sums = np.bincount(clusters, weights=values)
    if len(sizes) < 2:
        return math.nan
    residuals = sums - values.mean(dtype=np.float64) * sizes
    return float(np.sqrt(len(sizes) / (len(sizes) - 1) * (residuals**2).sum()) / len(values))


def per_token_arrays(per_token: PerToken) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Names and arrays as ``--per-token`` writes them."""
    for name in ("doc", "position", "token_id", "lm_logprob", "knn_logprob", "logprob"):
        yield name, getattr(per_token, name)
