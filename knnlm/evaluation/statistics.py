"""How sure a mean over tokens is: clustered standard errors and the paired block bootstrap. Pure numpy, vectorised.

Tokens of one text are not independent, so what is drawn, and what counts as one observation, is a cluster: a document,
or a block of a document where documents are few. Perplexities are ratios, of sums over clusters of unequal size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.evaluation.comparison import DoubleArray, Interval, LongArray

FEWEST_DOCUMENT_CLUSTERS = 20
TOKENS_PER_CLUSTER = 256
RESAMPLES = 2000
SEED = 0
LEVEL = 0.95
DRAWS_AT_ONCE = 1 << 21

UNKNOWN = Interval(math.nan, math.nan)

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Clusters:
    """``of`` [n] int64: the cluster of each token, 0 to ``count`` - 1; ``name`` says what a cluster is."""

    of: LongArray
    count: int
    name: str

    @classmethod
    def among(cls, document: Values, position: Values) -> Clusters:
        """Documents, or blocks of 256 tokens of each where there are fewer than 20; ``document`` and ``position`` [n]."""
        if len(np.unique(document)) >= FEWEST_DOCUMENT_CLUSTERS:
            names, of = np.unique(document, return_inverse=True)
            return cls(of.astype(np.int64), len(names), "documents")
        blocks = np.stack([document.astype(np.int64), position // TOKENS_PER_CLUSTER], axis=1)
        names, of = np.unique(blocks, axis=0, return_inverse=True)
        return cls(of.reshape(-1).astype(np.int64), len(names), f"blocks of {TOKENS_PER_CLUSTER} tokens")

    def sums(self, values: Values) -> DoubleArray:
        """Sum of ``values`` [n] in each cluster: [count] float64."""
        return np.asarray(np.bincount(self.of, values.astype(np.float64), self.count), np.float64)


def standard_error(values: Values, clusters: Clusters) -> float:
    """Standard error of the mean of ``values`` [n] over clusters of unequal size (linearised ratio estimator; Cochran, Sampling
    Techniques, section 6.4). NaN for one cluster, or where a value is not finite."""
    if not np.isfinite(values).all() or clusters.count < 2:
        return math.nan
    sizes = clusters.sums(np.ones(len(values)))
    residuals = clusters.sums(values) - values.mean(dtype=np.float64) * sizes
    return float(np.sqrt(clusters.count / (clusters.count - 1) * (residuals**2).sum()) / len(values))


def intervals_of_means(
    values: Values, clusters: Clusters, members: Sequence[Values] = (), *, resamples: int = RESAMPLES, seed: int = SEED
) -> list[Interval]:
    """Bootstrap interval of the mean of ``values`` [n], and then of its mean over each of ``members`` (each [n] bool).

    Clusters are drawn with replacement, as many as there are, ``resamples`` times; a resample's mean is the ratio of what the
    drawn clusters sum up to, and the interval its 2.5th to 97.5th percentile. All come from the same draws. NaN for tokens of
    one cluster, and where a value is not finite.
    """
    masks = [np.ones(len(values), bool), *members]
    if clusters.count < 2:
        return [UNKNOWN] * len(masks)
    sizes = np.stack([clusters.sums(mask) for mask in masks], axis=1)
    # One cluster gives one value, whatever is drawn.
    several = (sizes > 0).sum(axis=0) > 1
    usable = [bool(enough) and bool(np.isfinite(values[mask]).all()) for mask, enough in zip(masks, several, strict=True)]
    sums = np.stack([clusters.sums(np.where(mask & ok, values, 0.0)) for mask, ok in zip(masks, usable, strict=True)], axis=1)
    means = resampled_means(sums, sizes, resamples=resamples, seed=seed)
    return [_percentiles(means[:, place]) if ok else UNKNOWN for place, ok in enumerate(usable)]


def resampled_means(sums: DoubleArray, sizes: DoubleArray, *, resamples: int, seed: int) -> DoubleArray:
    """Ratios of the drawn clusters' ``sums`` [clusters, m] and ``sizes`` [clusters, m]: [resamples, m], NaN where a draw has
    nothing of a column."""
    chance, count = np.random.default_rng(seed), len(sums)
    both = np.concatenate([sums, sizes], axis=1)
    at_once = max(1, DRAWS_AT_ONCE // count)
    parts = []
    for first in range(0, resamples, at_once):
        rows = min(at_once, resamples - first)
        drawn = chance.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(times @ both)
    totals = np.concatenate(parts)
    above, below = totals[:, : sums.shape[1]], totals[:, sums.shape[1] :]
    ratios: DoubleArray = np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)
    return ratios


def _percentiles(means: DoubleArray) -> Interval:
    outside = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(means, [outside, 100 - outside])
    return Interval(float(low), float(high))


def relative(interval: Interval) -> Interval:
    """An interval of the mean gain in log-probability as one of the relative change of perplexity, exp(-gain) - 1."""
    return Interval(float(np.expm1(-interval.high)), float(np.expm1(-interval.low)))


def perplexity(log_probs: Values) -> float:
    """exp(mean negative log-likelihood); infinite where a token was given no probability at all."""
    loss = -float(log_probs.mean(dtype=np.float64))
    return math.exp(loss) if loss < 700 else math.inf
