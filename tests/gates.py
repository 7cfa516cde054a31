"""Gates made by hand, that tests of serving and of evaluation share, and what a gate sees, computed slowly from its definition."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from knnlm.gate import FEATURES, LM_FEATURES, DistanceBuckets, Gate, Network, SkipRule
from tests import reference

FEW = (0.0, 0.35, 0.8)
# Of a tiny model over its datastore, by feature.
TINY_MEANS = (5.1, -3.1, -3.0, 2.5, 0.7, 1.6, -1.1, -6.1, -29.0, 6.2, 0.0, 1.8, 1.3)
TINY_SCALES = (0.09, 0.4, 7.0, 0.3, 0.7, 0.4, 0.4, 1.0, 4.0, 0.5, 0.2, 0.3, 1.0)


def network(width: int, seed: int, scale: float = 1.0, *, tiny: bool = False) -> Network:
    """A random one with a hidden layer, over features as they are or, where ``tiny``, around those of a tiny model."""
    chance = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
        matrix = chance.normal(size=(outputs, inputs)) * scale
        return tuple(tuple(map(float, row)) for row in matrix), tuple(map(float, chance.normal(size=outputs)))

    means, scales = (TINY_MEANS[:width], TINY_SCALES[:width]) if tiny else ((0.0,) * width, (1.0,) * width)
    return Network(means, scales, (layer(width, 4), layer(4, 1)))


def random_gate(seed: int, *, skip: float | None = 0.5, floor: float = 0.3) -> Gate:
    """A network that gives many weights, 0 among them; about half of the rows are not searched (``skip`` None: all are)."""
    rule = None if skip is None else SkipRule(network(len(LM_FEATURES), seed + 1), skip)
    return Gate(network(len(FEATURES), seed, 0.5), floor, rule)


def tiny_gate(seed: int) -> Gate:
    """As :func:`random_gate`, for a tiny model over its datastore."""
    return Gate(network(len(FEATURES), seed, tiny=True), 0.4, SkipRule(network(len(LM_FEATURES), seed + 1, tiny=True), 0.3))


def buckets(*edges: float, weights: Sequence[float] = FEW) -> Gate:
    """Weights by the distance of the nearest neighbour; every row is searched."""
    return Gate(DistanceBuckets(edges, tuple(weights)))


def constant_gate(weight: float) -> Gate:
    """One weight for every row with neighbours, by way of a gate."""
    return Gate(DistanceBuckets((), (weight,)))


def followed(context: Sequence[int], left: Sequence[Sequence[int]]) -> int:
    """The longest end of ``context`` that is the end of one of the ``left`` contexts, at most 16."""
    longest = 0
    for before in left[:8]:
        length = 0
        while length < min(16, len(context), len(before)) and context[-1 - length] == before[-1 - length]:
            length += 1
        longest = max(longest, length)
    return longest


def slow_features(
    lm: reference.Floats, distances: Sequence[float], tokens: Sequence[int], temperature: float, followed_tokens: int
) -> list[float]:
    """What a gate sees of one row that has neighbours, nearest first; ``lm``: log-probabilities over the vocabulary."""
    knn = reference.knn_probabilities(np.array(distances), np.array(tokens), temperature, len(lm))
    voted = [t for t in dict.fromkeys(tokens) if knn[t] > 0]
    # Of equally probable ones the nearest.
    best = max(dict.fromkeys(tokens), key=lambda token: knn[token])
    lm_best = int(np.argmax(lm))

    def log(value: float, least: float) -> float:
        return math.log(value) if value > math.exp(least) else least

    values = {
        "lm_entropy": -sum(math.exp(x) * x for x in lm if x > -math.inf),
        "lm_max_log_prob": float(lm[lm_best]),
        "nearest": math.log(max(distances[0], 1e-6)),
        "mean_distance": math.log(max(float(np.mean(distances)), 1e-6)),
        "spread": math.log(max(float(np.std(distances)), 1e-6)),
        "knn_entropy": -sum(knn[t] * math.log(knn[t]) for t in voted),
        "knn_max_log_prob": log(knn[best], -30),
        "lm_of_knn_best": max(float(lm[best]), -30),
        "knn_of_lm_best": log(knn[lm_best], -30),
        "cross_entropy": -sum(knn[t] * max(float(lm[t]), -30) for t in voted),
        "agreement": float(best == lm_best),
        "distinct_tokens": math.log(len(set(tokens))),
        "followed": math.log(1 + followed_tokens),
    }
    return [values[name] for name in FEATURES]
