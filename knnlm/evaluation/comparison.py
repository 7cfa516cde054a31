"""What a comparison found: the figures of one datastore. Knows not how they are made.

Log-probabilities and differences are in nats, perplexities are exp(mean negative log-likelihood), shares are 0 to 1.
Intervals hold 95 % of the paired block bootstrap; what can't be known (one cluster of tokens, a token of probability 0)
is NaN. docs/comparing.md defines every figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from knnlm.mixture import Mixture

MUCH_OVERLAP = 0.1

FloatArray = np.ndarray[Any, np.dtype[np.float32]]
IntArray = np.ndarray[Any, np.dtype[np.int32]]
LongArray = np.ndarray[Any, np.dtype[np.int64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]
DoubleArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``, both included."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies in it."""
        return self.low <= value <= self.high


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
    """One row for each scored token, n of them, in document order.

    ``doc`` int32, the document's number; ``position`` int64 within it; ``token_id`` int32; ``lm_logprob``, ``knn_logprob``
    (-inf: not among the neighbours) and ``logprob`` of the mixture, float32. ``weight`` float32: λ that was used;
    ``searched`` bool; ``nearest`` float32: squared distance of the nearest neighbour, inf where there is none;
    ``lm_best``, ``best`` int32: the most probable token of base LM and mixture, with ``lm_best_logprob`` and
    ``best_logprob`` float32. ``neighbor_ids`` [n, 3] int64: entries of the three nearest neighbours, -1 where there is none;
    ``supporter`` int64: entry of the nearest neighbour that has the token itself, -1. ``frequency`` int64: how often the
    token stands in the datastore; ``contaminated`` bool: it lies in a sequence of 13 tokens that stands in the datastore.
    """

    doc: IntArray
    position: LongArray
    token_id: IntArray
    lm_logprob: FloatArray
    knn_logprob: FloatArray
    logprob: FloatArray
    weight: FloatArray
    searched: BoolArray
    nearest: FloatArray
    lm_best: IntArray
    lm_best_logprob: FloatArray
    best: IntArray
    best_logprob: FloatArray
    neighbor_ids: LongArray
    supporter: LongArray
    frequency: LongArray
    contaminated: BoolArray

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Every array by its name, as ``--per-token`` writes them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def gain(self) -> FloatArray:
        """What the neighbours changed: mixture less base LM, above 0 where the token became more probable: [n] float32."""
        return self.logprob - self.lm_logprob


@dataclass(frozen=True)
class Group:
    """Some of the tokens: perplexity of ``base`` LM and ``knn`` mixture on them, the relative ``change`` of it with its
    ``interval``, the share of tokens that became ``better`` (more probable), and the mean ``weight``. ``low`` and ``high``:
    of the values that put a token here, both included (None: open, or no number)."""

    name: str
    tokens: int
    base: float
    knn: float
    change: float
    interval: Interval
    better: float
    weight: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Breakdown:
    """All tokens in ``groups`` by one property of theirs: ``by`` names it (``frequency``, ``occurrence``, ``distance``),
    ``title`` says it in words. Groups without tokens are left out."""

    by: str
    title: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Histogram:
    """``counts`` [b] int64 of tokens by their change of log-probability: ``counts[i]`` lie in [``edges[i]``, ``edges[i + 1]``);
    ``edges`` [b + 1] float64, in nats. The first and the last bin also hold what lies beyond."""

    edges: DoubleArray
    counts: LongArray


@dataclass(frozen=True)
class Difference:
    """Paired change of log-probability, mixture less base, in nats: above 0 is better. ``mean`` with its ``standard_error``
    over clusters and bootstrap ``interval``."""

    mean: float
    standard_error: float
    interval: Interval
    histogram: Histogram


@dataclass(frozen=True)
class Reliability:
    """How far the probability of the most probable token is the share of cases in which it is right.

    ``error``: expected calibration error over equally wide bins; ``accuracy``, ``confidence``: means over all tokens. For the
    diagram, per bin [b]: ``counts`` int64 and the mean ``confidences`` and ``accuracies`` float64 (NaN in empty bins);
    ``edges`` [b + 1].
    """

    error: float
    accuracy: float
    confidence: float
    edges: DoubleArray
    counts: LongArray
    confidences: DoubleArray
    accuracies: DoubleArray


@dataclass(frozen=True)
class Cost:
    """``forward``, ``search`` (re-ranking included) and ``mixing``: shares of the time that went into scoring with the
    mixture; ``seconds`` of it; ``store_bytes`` on disk and ``bytes_per_token``, those for each entry."""

    forward: float
    search: float
    mixing: float
    seconds: float
    store_bytes: int
    bytes_per_token: float


@dataclass(frozen=True)
class Overlap:
    """Of the text's ``sequences`` of ``length`` tokens, ``found`` stand in the datastore; ``share`` is their part (0 of none)."""

    length: int
    sequences: int
    found: int

    @property
    def share(self) -> float:
        """``found`` of ``sequences``."""
        return self.found / self.sequences if self.sequences else 0.0

    @property
    def is_much(self) -> bool:
        """Whether what was measured says little about new text: above a tenth stands in the datastore."""
        return self.share > MUCH_OVERLAP


@dataclass(frozen=True)
class DocumentOverlap:
    """A document of the datastore that shares 13-token sequences with the text: ``found`` of its ``sequences``."""

    id: str
    source: str
    sequences: int
    found: int

    @property
    def share(self) -> float:
        """``found`` of ``sequences``."""
        return self.found / self.sequences


@dataclass(frozen=True)
class Excluded:
    """A document of the datastore that no search found. ``test_document``: id of the document of the text that has the same
    tokens; None: it was asked for by its id."""

    id: str
    source: str
    entries: int
    test_document: str | None


@dataclass(frozen=True)
class Leakage:
    """Does the text stand in the datastore (less what was excluded)?

    ``overlaps`` for sequences of 8, 13 and 32 tokens; ``contaminated`` and ``clean`` tokens apart (None: there are none);
    ``documents`` that share most 13-token sequences with the text, most first, of ``overlapping`` that share any.
    """

    overlaps: tuple[Overlap, ...]
    contaminated: Group | None
    clean: Group | None
    documents: tuple[DocumentOverlap, ...]
    overlapping: int
    excluded: tuple[Excluded, ...]

    def share(self, length: int) -> float:
        """Share of the text's sequences of ``length`` tokens that stand in the datastore."""
        return next(overlap.share for overlap in self.overlaps if overlap.length == length)

    @property
    def is_much(self) -> bool:
        """Whether the figures say little about new text: above a tenth of the 13-token sequences stand in the datastore."""
        return self.share(13) > MUCH_OVERLAP


@dataclass(frozen=True)
class ComparedBaseline:
    """Something simpler mixed with the base LM, on the same targets, with ``settings`` and ``weight`` of its own.

    ``log_probs`` [n] float32 of the mixture and its ``perplexity`` (speed is not measured); ``alone``: perplexity without the LM,
    infinite where it finds a token impossible; ``change`` against the base LM and its ``interval``; ``knn_change``: of the
    kNN-LM against this, with ``knn_interval``.
    """

    name: str
    settings: Mapping[str, Any]
    weight: float
    perplexity: Perplexity
    alone: float
    change: float
    interval: Interval
    knn_change: float
    knn_interval: Interval
    log_probs: FloatArray


@dataclass(frozen=True)
class Comparison:
    """Base LM and kNN-LM over the same tokens, of one datastore.

    ``change``: relative change of perplexity, below 0 where the kNN-LM is better, with ``change_standard_error`` of the
    paired difference and ``interval``; ``better``, ``worse``: shares of tokens that became more, or less, probable;
    ``clusters``: what standard errors and intervals count as independent (``documents``, or ``blocks of 256 tokens`` where
    there are fewer than 20 documents), ``cluster_count`` of them. ``mean_weight``: λ over all tokens; ``skipped``: share of
    tokens without a search; ``gated``: whether λ was chosen for each token by the profile's gate. ``baselines`` by name (none
    where they were not asked for), ``baselines_left_out``: why others are missing.
    """

    documents: int
    tokens: int
    mixture: Mixture
    gated: bool
    base: Perplexity
    knn: Perplexity
    change: float
    change_standard_error: float
    interval: Interval
    better: float
    worse: float
    mean_weight: float
    skipped: float
    clusters: str
    cluster_count: int
    difference: Difference
    breakdowns: tuple[Breakdown, ...]
    base_reliability: Reliability
    knn_reliability: Reliability
    cost: Cost
    leakage: Leakage
    baselines: Mapping[str, ComparedBaseline]
    baselines_left_out: Mapping[str, str]
    per_token: PerToken

    @property
    def overlap(self) -> float:
        """Share of 13-token sequences of the text that stand in the datastore."""
        return self.leakage.share(13)
