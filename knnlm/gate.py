"""The gate: λ for each token by itself, from what is known before it is drawn. Pure functions over tensors, and settings.

One λ for all tokens mixes neighbours in where they know nothing. A gate looks at the LM's distribution and at the
neighbours and gives each row its own λ, down to 0; Drozdov et al. (2022) choose it by the nearest distance (section 4),
He et al. (2021) by a small network (section 3.2). A rule over the LM's features alone says where searching is not worth it.
Features are the same numbers in serving and in calibration; a row's features depend on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from knnlm.neighbors import Neighbors

LM_FEATURES = ("lm_entropy", "lm_max_log_prob")
FEATURES = (
    *LM_FEATURES,
    "nearest",
    "mean_distance",
    "spread",
    "knn_entropy",
    "knn_max_log_prob",
    "lm_of_knn_best",
    "knn_of_lm_best",
    "cross_entropy",
    "agreement",
    "distinct_tokens",
    "followed",
)
ROWS_AT_ONCE = 16
LEAST_LOG_PROB = -30.0
LEAST_DISTANCE = 1e-6
MOST_WEIGHT = 0.999999
"""Of a network, whose sigmoid is 1 where features lie far beyond those it was fitted to: no token of the LM's becomes impossible."""


@dataclass(frozen=True)
class LMSummary:
    """What a gate sees of the LM's distribution, each [n]: ``entropy`` and ``max_log_prob`` float32, in nats; ``best``
    int64, the most probable token (the smallest id among equals)."""

    entropy: Tensor
    max_log_prob: Tensor
    best: Tensor

    @classmethod
    def of(cls, log_probs: Tensor) -> LMSummary:
        """Of log-probabilities [n, vocabulary], in memory for a few rows at a time."""
        entropies, most, best = zip(*map(_summed_up, log_probs.split(ROWS_AT_ONCE)), strict=True)
        return cls(torch.cat(entropies), torch.cat(most), torch.cat(best))


def _summed_up(log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entropy, largest log-probability and its token of some rows [n, vocabulary]."""
    most = log_probs.max(1)
    # 0 · log 0 is 0. Summed up in float64, since a lone row may be divided between threads and another is not.
    terms = log_probs.exp().mul_(log_probs.clamp(min=torch.finfo(log_probs.dtype).min))
    return -terms.sum(1, dtype=torch.float64).to(log_probs.dtype), most.values, most.indices


def lm_features(lm: LMSummary) -> Tensor:
    """The features of :data:`LM_FEATURES`: [n, 2] float64."""
    return torch.stack([lm.entropy.double(), lm.max_log_prob.double()], dim=1)


def gate_features(lm: LMSummary, neighbors: Neighbors, votes: Tensor, lm_of_neighbors: Tensor, followed: Tensor) -> Tensor:
    """The features of :data:`FEATURES`: [n, 13] float64, all finite. Rows without any neighbour have those of the LM, else 0.

    ``votes`` [n, k]: log p_kNN of each neighbour's token; ``lm_of_neighbors`` [n, k]: the LM's log-probability of it;
    ``followed`` [n]: how many tokens of context the row shares with one of its nearest neighbours
    (:func:`knnlm.following.followed_lengths`).
    """
    found = neighbors.found
    distances = torch.where(found, neighbors.distances.double(), 0.0)
    count = found.sum(1).clamp(min=1)
    nearest, mean = distances[:, 0], distances.sum(1) / count
    spread = (torch.where(found, (distances - mean[:, None]).square(), 0.0).sum(1) / count).sqrt()
    first = _first_of_each_token(neighbors)
    votes = votes.double()
    probabilities = torch.where(first, votes.exp(), 0.0)
    entropy = -torch.where(probabilities > 0, probabilities * votes, 0.0).sum(1)
    best = torch.where(found, votes, -torch.inf).max(1)
    lm_of_best = lm_of_neighbors.double().gather(1, best.indices[:, None])[:, 0]
    knn_of_best = torch.where(found & (neighbors.tokens == lm.best[:, None]), votes, -torch.inf).max(1).values
    # -Σ p_kNN log p_LM: how surprised the LM would be by what the neighbours say.
    surprise = -(probabilities * lm_of_neighbors.double().clamp(min=LEAST_LOG_PROB)).sum(1)
    agreement = neighbors.tokens.gather(1, best.indices[:, None])[:, 0] == lm.best
    of_neighbors = [
        nearest.clamp(min=LEAST_DISTANCE).log(),
        mean.clamp(min=LEAST_DISTANCE).log(),
        spread.clamp(min=LEAST_DISTANCE).log(),
        entropy,
        best.values.clamp(min=LEAST_LOG_PROB),
        lm_of_best.clamp(min=LEAST_LOG_PROB),
        knn_of_best.clamp(min=LEAST_LOG_PROB),
        surprise,
        agreement.double(),
        first.sum(1).clamp(min=1).double().log(),
        followed.double().log1p(),
    ]
    none = ~found.any(1)
    return torch.cat([lm_features(lm), torch.stack(of_neighbors, dim=1).masked_fill(none[:, None], 0.0)], dim=1)


def _first_of_each_token(neighbors: Neighbors) -> Tensor:
    """[n, k] bool: the nearest neighbour of each token that is among them."""
    tokens, order = torch.where(neighbors.found, neighbors.tokens, -1).sort(dim=1, stable=True)
    changes = torch.ones_like(tokens, dtype=torch.bool)
    changes[:, 1:] = tokens[:, 1:] != tokens[:, :-1]
    return torch.zeros_like(changes).scatter_(1, order, changes) & neighbors.found


@dataclass(frozen=True)
class DistanceBuckets:
    """λ by the distance of the nearest neighbour (Drozdov et al., 2022, section 4): ``weights[i]`` up to and including
    ``edges[i]``, the last weight beyond the last edge. ``edges`` ascend, in units of squared distance."""

    edges: tuple[float, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.edges) + 1 or any(not 0 <= weight <= 1 for weight in self.weights):
            raise ValueError("a gate of distance buckets has one weight from 0 to 1 more than edges")
        if any(not before < after for before, after in pairwise(self.edges)):
            raise ValueError("the edges of distance buckets must ascend")

    def __call__(self, features: Tensor) -> Tensor:
        """λ [n] float64 for ``features`` [n, 13]."""
        return torch.tensor(self.weights, dtype=torch.float64)[self.places(features)]

    def places(self, features: Tensor) -> Tensor:
        """The number of each row's bucket: [n] int64."""
        nearest = features[:, FEATURES.index("nearest")].contiguous()
        edges = torch.tensor(self.edges, dtype=torch.float64).clamp(min=LEAST_DISTANCE).log()
        return torch.bucketize(nearest, edges)


@dataclass(frozen=True)
class Network:
    """A logistic function, or a small network with tanh layers before it, over standardised features.

    ``means`` and ``scales``, one for each feature; ``layers`` of (weights [out][in], biases [out]), the last with one
    output; the result is sigmoid of that, 0 to 1.
    """

    means: tuple[float, ...]
    scales: tuple[float, ...]
    layers: tuple[tuple[tuple[tuple[float, ...], ...], tuple[float, ...]], ...]

    def __post_init__(self) -> None:
        width = len(self.means)
        if len(self.scales) != width or not all(scale > 0 for scale in self.scales):
            raise ValueError("a gate's network has a scale above 0 for each mean")
        for matrix, biases in self.layers:
            if len(matrix) != len(biases) or any(len(row) != width for row in matrix):
                raise ValueError("the layers of a gate's network do not fit one another")
            width = len(biases)
        numbers = [*self.means, *self.scales, *(value for matrix, biases in self.layers for row in (*matrix, biases) for value in row)]
        if not self.layers or width != 1 or not all(map(math.isfinite, numbers)):
            raise ValueError("a gate's network ends in one output, and its numbers are finite")

    def __call__(self, features: Tensor) -> Tensor:
        """0 to 1 [n] float64 for ``features`` [n, len(means)]."""
        values = (features - torch.tensor(self.means, dtype=torch.float64)) / torch.tensor(self.scales, dtype=torch.float64)
        for place, (matrix, biases) in enumerate(self.layers):
            values = values @ torch.tensor(matrix, dtype=torch.float64).T + torch.tensor(biases, dtype=torch.float64)
            if place < len(self.layers) - 1:
                values = values.tanh()
        # As float32: in which order a batch's products are summed up changes the last bits of a float64.
        return values[:, 0].sigmoid().float().double()


@dataclass(frozen=True)
class SkipRule:
    """Where a search is not worth it: the ``network`` over the features of the LM alone gives less than ``threshold``."""

    network: Network
    threshold: float

    def __call__(self, features: Tensor) -> Tensor:
        """[n] bool for ``features`` [n, 2]."""
        return self.network(features) < self.threshold


@dataclass(frozen=True)
class Gate:
    """λ for each row: ``form`` gives it, and what is below ``floor`` is 0. ``skip`` says where none is even searched for
    (None: every row is searched). Belongs to the k and the temperature that it was calibrated with."""

    form: DistanceBuckets | Network
    floor: float = 0.0
    skip: SkipRule | None = None

    def weights(self, features: Tensor) -> Tensor:
        """λ [n] float64 for ``features`` [n, 13]."""
        weights = self.form(features)
        if isinstance(self.form, Network):
            weights = weights.clamp(max=MOST_WEIGHT)
        return torch.where(weights < self.floor, 0.0, weights)

    def skips(self, features: Tensor) -> Tensor:
        """[n] bool for ``features`` [n, 2] of the LM: rows whose λ is 0 without a search."""
        return torch.zeros(len(features), dtype=torch.bool) if self.skip is None else self.skip(features)

    def content(self) -> dict[str, Any]:
        """As JSON; :meth:`of` reads it."""
        kind = "distance_buckets" if isinstance(self.form, DistanceBuckets) else "network"
        skip = {} if self.skip is None else {"skip": asdict(self.skip)}
        return {"kind": kind, "features": list(FEATURES), "floor": self.floor, **asdict(self.form), **skip}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Gate:
        """What :meth:`content` gave; raises KeyError, TypeError or ValueError for anything else."""
        if tuple(content["features"]) != FEATURES:
            raise ValueError(f"the gate looks at {', '.join(content['features'])}, but this release computes {', '.join(FEATURES)}")
        skip = content.get("skip")
        rule = None if skip is None else SkipRule(_network(skip["network"], len(LM_FEATURES)), float(skip["threshold"]))
        form: DistanceBuckets | Network
        if content["kind"] == "distance_buckets":
            form = DistanceBuckets(_numbers(content["edges"]), _numbers(content["weights"]))
        elif content["kind"] == "network":
            form = _network(content, len(FEATURES))
        else:
            raise ValueError(f"{content['kind']!r} is no kind of gate")
        return cls(form, float(content["floor"]), rule)


def _network(content: Mapping[str, Any], width: int) -> Network:
    layers = tuple((tuple(_numbers(row) for row in matrix), _numbers(biases)) for matrix, biases in content["layers"])
    network = Network(_numbers(content["means"]), _numbers(content["scales"]), layers)
    if len(network.means) != width:
        raise ValueError(f"a gate's network looks at {len(network.means)} features, but there are {width}")
    return network


def _numbers(values: Sequence[Any]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
