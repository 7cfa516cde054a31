"""The best fixed mixture over a neighbour cache: λ by convex search, T by a search in one dimension, k from powers of two.

Deterministic. Pure but for reading the cache: no model, no index. For given k and T the mean log-likelihood is concave
in λ (a sum of logarithms of linear functions), so its maximum is found to any precision; T has no such guarantee and
is searched on a grid in log T first, then refined around the best of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knnlm.evaluation.neighbor_cache import CachedTokens, NeighborCache
from knnlm.mixture import Mixture

TEMPERATURES_PER_DECADE = 4
REFINEMENTS = 8
WEIGHT_TOLERANCE = 1e-6
ROWS_AT_ONCE = 1 << 13

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Point:
    """One setting of the surface: the best ``weight`` for ``k`` and ``temperature``, and the mean negative
    log-likelihood (nats a token) that it gives."""

    k: int
    temperature: float
    weight: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """The best mixture, the mean loss of the base LM and of the mixture (nats a token), and every point looked at."""

    mixture: Mixture
    base_loss: float
    loss: float
    surface: tuple[Point, ...]


def fit_mixture(cache: NeighborCache, ks: Sequence[int] | None = None) -> Fit:
    """The k, T and λ of the highest likelihood of the cached text. ``ks``: None for all powers of two up to the cache's k.

    Of settings that are equally good to 1e-9 nats the one with the smaller k is taken.
    """
    sizes = sorted(set(ks)) if ks is not None else powers_of_two(cache.k)
    lm = np.concatenate([np.asarray(part.lm_log_prob, np.float64) for part in cache.parts()])
    points: list[Point] = []
    for temperature in temperature_grid(cache):
        points += _points(cache, lm, sizes, temperature)
    for _ in range(REFINEMENTS):
        best = _best(points)
        for temperature in _between(points, best):
            points += _points(cache, lm, [best.k], temperature)
    best = _best(points)
    surface = tuple(sorted(points, key=lambda point: (point.k, point.temperature)))
    return Fit(Mixture(best.k, best.temperature, best.weight), -float(lm.mean()), best.loss, surface)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to ``most``, which ends the list whatever it is."""
    return [*(1 << place for place in range(most.bit_length()) if 1 << place < most), most]


def temperature_grid(cache: NeighborCache) -> list[float]:
    """Temperatures around the spread of distances, evenly in log T: from where the nearest neighbour decides alone to
    where all vote alike."""
    spreads = np.concatenate([_spread(part) for part in cache.parts()])
    spreads = spreads[np.isfinite(spreads) & (spreads > 0)]
    middle = float(np.median(spreads)) if len(spreads) else 1.0
    exponents = np.arange(-2 * TEMPERATURES_PER_DECADE, 1.5 * TEMPERATURES_PER_DECADE + 1) / TEMPERATURES_PER_DECADE
    return [float(middle * 10**exponent) for exponent in exponents]


def _spread(part: CachedTokens) -> Array:
    """Distance from the nearest to the farthest neighbour that was found, per token; NaN where none was."""
    spreads = []
    for start in range(0, len(part), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        last = (np.asarray(part.ids[rows]) >= 0).sum(1) - 1
        distances = np.asarray(part.distances[rows], np.float64)
        farthest = np.take_along_axis(distances, np.maximum(last, 0)[:, None], 1)[:, 0]
        spreads.append(np.where(last >= 0, farthest, np.nan) - np.where(last >= 0, distances[:, 0], np.nan))
    return np.concatenate(spreads)


def target_log_probs(part: CachedTokens, ks: Sequence[int], temperature: float) -> Array:
    """log p_kNN of each token's target with the first k neighbours, for each of ``ks`` (ascending): [len(ks), n] float64.

    -inf where none of the k has the target; rows without any neighbour are NaN, since there is no distribution.
    One pass serves all k: weights relative to the nearest are added up from the nearest on.
    """
    parts = []
    places = torch.tensor([k - 1 for k in ks])
    for start in range(0, len(part), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        distances = torch.from_numpy(np.array(part.distances[rows, : ks[-1]])).double()
        found = torch.from_numpy(np.array(part.ids[rows, : ks[-1]])) >= 0
        same = torch.from_numpy(part.tokens[rows, : ks[-1]] == part.target[rows, None])
        weights = torch.where(found, ((distances[:, :1] - distances) / temperature).exp(), 0.0)
        total = weights.cumsum(1)[:, places]
        matched = torch.where(same, weights, 0.0).cumsum(1)[:, places]
        parts.append((matched / total).log().T)
    return torch.cat(parts, dim=1).numpy()


def best_weight(lm: Array, knn: Array, importance: Array | None = None) -> tuple[float, float]:
    """The λ of the highest mean log-likelihood, and the mean loss there (nats a token).

    ``lm`` and ``knn`` [n]: log-probabilities of the targets; NaN in ``knn``: no neighbour, the base LM alone, whatever λ is.
    ``importance`` [n]: how much each token counts (None: all the same).
    Bisection on the derivative Σ (r-1)/(1+λ(r-1)) with r = p_kNN/p_LM, which falls in λ.
    """
    searched = ~np.isnan(knn)
    gain = np.expm1(np.clip(knn[searched] - lm[searched], None, 700.0))
    counts = np.ones(len(lm)) if importance is None else importance
    low, high = 0.0, 1.0
    if not len(gain) or float(counts[searched] @ gain) <= 0:
        return 0.0, -float(np.average(lm, weights=counts))
    while high - low > WEIGHT_TOLERANCE:
        middle = (low + high) / 2
        if float(counts[searched] @ (gain / (1 + middle * gain))) > 0:
            low = middle
        else:
            high = middle
    weight = round(low, 6)
    return weight, mixture_loss(lm, knn, weight, counts)


def mixture_loss(lm: Array, knn: Array, weight: float, importance: Array | None = None) -> float:
    """Mean negative log-likelihood (nats a token) of the mixture with one λ for all tokens; NaN in ``knn``: the LM alone."""
    return -float(np.average(mixed_log_probs(lm, knn, weight), weights=importance))


def mixed_log_probs(lm: Array, knn: Array, weight: float | Array) -> Array:
    """log(λ p_kNN + (1-λ) p_LM) [n], ``weight`` one number or [n]; NaN in ``knn``: the LM alone."""
    weights = np.broadcast_to(np.asarray(weight, np.float64), lm.shape)
    with np.errstate(divide="ignore"):
        mixed = np.logaddexp(np.log(weights) + np.nan_to_num(knn, nan=-np.inf, neginf=-np.inf), np.log1p(-weights) + lm)
    return np.where(np.isnan(knn) | (weights == 0), lm, mixed)


def _points(cache: NeighborCache, lm: Array, ks: Sequence[int], temperature: float) -> list[Point]:
    knn = np.concatenate([target_log_probs(part, ks, temperature) for part in cache.parts()], axis=1)
    return [Point(k, temperature, *best_weight(lm, knn[place])) for place, k in enumerate(ks)]


def _best(points: Sequence[Point]) -> Point:
    least = min(point.loss for point in points)
    return min((point for point in points if point.loss <= least + 1e-9), key=lambda point: (point.k, point.temperature))


def _between(points: Sequence[Point], best: Point) -> list[float]:
    """Temperatures halfway (in log T) from the best to its neighbours of the same k."""
    tried = sorted(point.temperature for point in points if point.k == best.k)
    place = tried.index(best.temperature)
    around = tried[max(0, place - 1) : place] + tried[place + 1 : place + 2]
    return [math.sqrt(best.temperature * other) for other in around]
