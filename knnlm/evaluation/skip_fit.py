"""Where a search is not worth it: a rule over features of the LM alone, which saves searches at a bounded loss.

He et al. (2021), section 3.2, prune retrieval by a network that predicts λ; here it predicts what the search would
gain. The threshold is chosen on held-out documents. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from knnlm.evaluation.gate_fit import Lesson
from knnlm.evaluation.gate_network import Examples, fit_epochs, squared_loss
from knnlm.gate import Network, SkipRule

HIDDEN = (8,)
EPOCHS = 15
MOST_LOSS = 1e-3
LEAST_SAVED = 0.01
LEAST_REACH = 1e-6
SHARES = tuple(round(0.1 * place, 1) for place in range(1, 11))

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SkipPoint:
    """At a ``threshold``: the share of searches ``saved``, and the relative ``change`` of perplexity by it, on held-out documents."""

    threshold: float
    saved: float
    change: float


@dataclass(frozen=True)
class SkipFit:
    """``rule``: of the most searches saved at a loss of at most 0.1 % perplexity (None: it would save less than 1 %), ``chosen``
    its point; ``curve``: about every tenth of the searches. ``skipped`` [n] bool: held-out decisions for each token."""

    rule: SkipRule | None
    chosen: SkipPoint | None
    curve: tuple[SkipPoint, ...]
    skipped: Array


def fit_skip_rule(taught: Lesson, weights: Array) -> SkipFit:
    """The rule for a gate that gave each token λ ``weights`` [n] while its document was held out."""
    gain = taught.data.log_probs(weights) - taught.data.lm
    # Between 0 and 1, as a network answers; what is beyond the reach is rare.
    reach = max(float(np.quantile(np.abs(gain), 0.999)), LEAST_REACH)
    targets = np.clip(gain / reach, -1, 1) / 2 + 0.5
    scores = np.empty(len(gain))
    for fit, judge in taught.splits():
        scores[judge] = _fit(taught, targets, fit)(taught.data.lm_features[torch.from_numpy(judge)]).numpy()
    ordered = np.sort(scores[taught.useful])
    points = skip_points(scores[taught.useful], gain[taught.useful])
    within = [place for place, point in enumerate(points) if point.change <= MOST_LOSS]
    chosen = points[within[-1]] if within else None
    curve = (
        tuple(points[min(len(points) - 1, int(np.searchsorted([p.saved for p in points], share)))] for share in SHARES) if points else ()
    )
    if chosen is None or chosen.saved < LEAST_SAVED or not len(ordered):
        return SkipFit(None, None, curve, np.zeros(len(gain), bool))
    network = _fit(taught, targets, np.ones(len(gain), bool))
    return SkipFit(SkipRule(network, chosen.threshold), chosen, curve, scores < chosen.threshold)


def skip_points(scores: Array, gain: Array) -> list[SkipPoint]:
    """What skipping below each threshold between two scores saves and costs, by threshold; ``gain`` [n] nats of a search."""
    order = np.argsort(scores, kind="stable")
    lost = np.cumsum(gain[order]) / len(gain)
    ordered = scores[order]
    # A threshold stands after the last of equal scores.
    ends = np.flatnonzero(np.append(ordered[1:] > ordered[:-1], True))
    thresholds = np.append(ordered[ends[:-1] + 1], np.nextafter(ordered[-1], np.inf))
    return [
        SkipPoint(float(threshold), (int(end) + 1) / len(gain), float(np.expm1(lost[end])))
        for threshold, end in zip(thresholds, ends, strict=True)
    ]


def _fit(taught: Lesson, targets: Array, chosen: Array) -> Network:
    """A network over the LM's features that predicts ``targets`` [n]."""
    features = taught.data.lm_features[torch.from_numpy(chosen)]
    examples = Examples(features, torch.from_numpy(targets[chosen]), torch.from_numpy(taught.importance[chosen]))
    return fit_epochs(examples, HIDDEN, 0.5, squared_loss, epochs=EPOCHS)[-1]
