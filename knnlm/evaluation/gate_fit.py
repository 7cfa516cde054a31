"""Fitting a gate: distance buckets and small networks, each judged on documents that it was not fitted to.

Drozdov et al. (2022), section 4, for the buckets; He et al. (2021), section 3.2, for a network. Cross-fitting: every
document is judged by what was fitted to the others, and the gate that is used is then fitted to all. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knnlm.evaluation.gate_data import GateData
from knnlm.evaluation.gate_network import Examples, fit_epochs, log_gain
from knnlm.evaluation.mixture_fit import best_weight
from knnlm.gate import FEATURES, DistanceBuckets, Gate, Network

FOLDS = 4
SEED = 0
BUCKETS = (2, 4, 8, 16, 32, 64)
FEWEST_IN_BUCKET = 50
EPOCHS = 24
HIDDEN: dict[str, tuple[int, ...]] = {"logistic function": (), "network": (24,)}
NEGATIVE_SHARES = (0.2, 0.5, 0.8, 0.95)
FLOORS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)
EQUALLY_GOOD = 1e-5

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Lesson:
    """Tokens to fit a gate to: ``data``; ``importance`` [n] float64, its mean 1; ``part`` [n], 0 for the validation text with its
    own neighbours, from 1 on for what is negative; ``fold`` [n], 0 to ``folds`` - 1, of each token's document."""

    data: GateData
    importance: Array
    part: Array
    fold: Array
    folds: int

    @property
    def useful(self) -> Array:
        """[n] bool: tokens of the validation text with their own neighbours."""
        useful: Array = self.part == 0
        return useful

    def loss(self, weights: Array) -> float:
        """Mean loss (nats a token) with λ ``weights`` [n], each token as it counts."""
        return -float(np.average(self.data.log_probs(weights), weights=self.importance))

    def splits(self) -> Iterator[tuple[Array, Array]]:
        """For each fold: which tokens to fit to, and which to judge with, [n] bool."""
        for number in range(self.folds):
            yield self.fold != number, self.fold == number

    def examples(self, chosen: Array) -> Examples:
        """What a network is fitted to."""
        data = self.data.rows(chosen)
        return Examples(data.features, log_gain(data.lm, data.knn), torch.from_numpy(self.importance[chosen]))


@dataclass(frozen=True)
class Fitted:
    """A form of gate fitted to everything, and the λ [n] that it gave each token while that token's document was held out;
    ``detail`` says how many buckets or epochs were the best."""

    name: str
    form: DistanceBuckets | Network
    held_out: Array
    detail: str


def lesson(
    useful: GateData, shuffled: GateData | None, negatives: Sequence[GateData], negative_share: float = NEGATIVE_SHARES[0]
) -> Lesson:
    """Validation text, its shuffled contexts and other text: ``negative_share`` of what counts is negative, each kind as much as
    any other.

    ``shuffled`` has the documents of ``useful``, and theirs is their fold.
    """
    useless = [part for part in (shuffled, *negatives) if part is not None]
    parts = [useful, *useless]
    share = negative_share if useless else 0.0
    shares = [1 - share, *(share / len(useless) for _ in useless)]
    lengths = [len(part) for part in parts]
    importance = np.repeat([sum(lengths) * part_share / length for part_share, length in zip(shares, lengths, strict=True)], lengths)
    text = [0 if part is shuffled else number for number, part in enumerate(parts)]
    groups = np.concatenate([np.insert(part.groups, 0, number, axis=1) for part, number in zip(parts, text, strict=True)])
    return Lesson(GateData.joined(parts), importance, np.repeat(np.arange(len(parts)), lengths), *fold_numbers(groups))


def fold_numbers(groups: Array) -> tuple[Array, int]:
    """A fold for each row of ``groups`` [n, d], the same for equal rows, and how many folds there are: at most 4."""
    names, of = np.unique(groups, axis=0, return_inverse=True)
    folds = min(FOLDS, len(names))
    return np.random.default_rng(SEED).permutation(len(names))[of.reshape(-1)] % folds, folds


def fixed_held_out(taught: Lesson) -> Array:
    """The best fixed λ of the other folds' validation text, for each token: [n]."""
    weights = np.empty(len(taught.data))
    for fit, judge in taught.splits():
        rows = fit & taught.useful
        weights[judge] = best_weight(taught.data.lm[rows], taught.data.knn[rows])[0]
    return weights


def fit_buckets(data: GateData, importance: Array, count: int) -> DistanceBuckets:
    """``count`` buckets of as many tokens each, by the distance of the nearest neighbour, and the best λ of each one.

    Fewer where distances are equal, or where a bucket would hold fewer than 50 tokens.
    """
    nearest = data.features[:, FEATURES.index("nearest")].exp().numpy()
    found = ~np.isnan(data.knn)
    most = max(1, int(found.sum()) // FEWEST_IN_BUCKET)
    shares = np.arange(1, min(count, most)) / min(count, most)
    edges = np.unique(np.quantile(nearest[found], shares)).tolist() if found.any() else []
    place = DistanceBuckets(tuple(edges), (0.0,) * (len(edges) + 1)).places(data.features).numpy()
    buckets = [found & (place == number) for number in range(len(edges) + 1)]
    weights = [best_weight(data.lm[rows], data.knn[rows], importance[rows])[0] if rows.any() else 0.0 for rows in buckets]
    return DistanceBuckets(tuple(edges), tuple(weights))


def buckets_held_out(taught: Lesson) -> Fitted:
    """Distance buckets; as many as are best on held-out documents, of equally good numbers the smallest."""

    def held_out(count: int) -> Array:
        return _cross_fitted(taught, lambda rows: fit_buckets(taught.data.rows(rows), taught.importance[rows], count))

    tried = [(count, held_out(count)) for count in BUCKETS]
    losses = [taught.loss(weights) for _, weights in tried]
    count, weights = next(pair for pair, loss in zip(tried, losses, strict=True) if loss <= min(losses) + EQUALLY_GOOD)
    form = fit_buckets(taught.data, taught.importance, count)
    return Fitted("distance buckets", form, weights, f"{len(form.weights)} buckets")


def network_held_out(taught: Lesson, name: str, start: float) -> Fitted:
    """A network of the sizes of :data:`HIDDEN`; fitting stops after the epoch that is best on held-out documents.

    ``start``: the λ that it begins with.
    """
    data, hidden = taught.data, HIDDEN[name]
    start = float(np.clip(start, 0.01, 0.9))
    weights = np.empty((EPOCHS, len(data)))
    for fit, judge in taught.splits():
        features = data.features[torch.from_numpy(judge)]
        for epoch, network in enumerate(fit_epochs(taught.examples(fit), hidden, start, epochs=EPOCHS)):
            weights[epoch, judge] = Gate(network).weights(features).numpy()
    best = int(np.argmin([taught.loss(of_epoch) for of_epoch in weights]))
    form = fit_epochs(taught.examples(np.ones(len(data), bool)), hidden, start, epochs=best + 1)[-1]
    return Fitted(name, form, weights[best], f"{best + 1} epochs")


def best_floor(taught: Lesson, weights: Array) -> float:
    """The floor, below which λ is 0, of the least held-out loss; of those equally good to 1e-5 nats the highest."""
    losses = [taught.loss(np.where(weights < floor, 0.0, weights)) for floor in FLOORS]
    return max(floor for floor, loss in zip(FLOORS, losses, strict=True) if loss <= min(losses) + EQUALLY_GOOD)


def _cross_fitted(taught: Lesson, fit_to: Callable[[Array], DistanceBuckets]) -> Array:
    """λ [n] of each token by the form that was fitted to the other folds."""
    weights = np.empty(len(taught.data))
    for fit, judge in taught.splits():
        weights[judge] = fit_to(fit)(taught.data.features[torch.from_numpy(judge)]).numpy()
    return weights
