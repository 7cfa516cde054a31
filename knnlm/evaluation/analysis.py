"""What is said of one pass over a text: from arrays of its tokens to the figures of a comparison. Searches nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from knnlm.evaluation.baselines.baseline import Baseline
from knnlm.evaluation.breakdowns import (
    Part,
    Scores,
    breakdown,
    distance_parts,
    frequency_parts,
    gain_of,
    groups,
    occurrence_parts,
)
from knnlm.evaluation.comparison import (
    Breakdown,
    ComparedBaseline,
    Cost,
    Difference,
    FloatArray,
    Histogram,
    Interval,
    Leakage,
    Perplexity,
    PerToken,
    Reliability,
)
from knnlm.evaluation.exclusion import Exclusion
from knnlm.evaluation.leakage import Audit
from knnlm.evaluation.reliability import reliability
from knnlm.evaluation.statistics import Clusters, intervals_of_means, perplexity, relative, standard_error
from knnlm.evaluation.token_scores import Seconds
from knnlm.tokenized import TokenizedDocument

HISTOGRAM_EDGES = np.linspace(-4, 8, 121)


@dataclass(frozen=True)
class Analysis:
    """The tokens of ``text`` as they were scored, and the ``clusters`` that count as independent among them."""

    text: Sequence[TokenizedDocument]
    per_token: PerToken
    clusters: Clusters

    @classmethod
    def of(cls, text: Sequence[TokenizedDocument], per_token: PerToken) -> Analysis:
        """With clusters as :class:`Clusters` chooses them."""
        return cls(text, per_token, Clusters.among(per_token.doc, per_token.position))

    @property
    def scores(self) -> Scores:
        """Base LM and mixture."""
        return Scores(self.per_token.lm_logprob, self.per_token.logprob, self.per_token.weight)

    def perplexity(self, log_probs: FloatArray, seconds: float = math.nan) -> Perplexity:
        """Of ``log_probs`` [n], scored in so many ``seconds`` (NaN: not measured)."""
        value = perplexity(log_probs)
        counts = [document.scored_bytes() for document in self.text]
        scored_bytes = None if None in counts else sum(count or 0 for count in counts)
        bits = -float(log_probs.sum(dtype=np.float64)) / math.log(2)
        error = value * standard_error(log_probs, self.clusters)
        return Perplexity(value, error, bits / scored_bytes if scored_bytes else None, len(log_probs) / seconds)

    def change(self, before: FloatArray, after: FloatArray) -> tuple[float, Interval]:
        """Relative change of perplexity from log-probabilities ``before`` to ``after`` [n], with its interval."""
        interval = intervals_of_means(gain_of(before, after), self.clusters)[0]
        return perplexity(after) / perplexity(before) - 1, relative(interval)

    def difference(self) -> Difference:
        """Mixture less base LM."""
        gain = self.scores.gain
        counts = np.histogram(np.clip(gain, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0]
        interval = intervals_of_means(gain, self.clusters)[0]
        mean = float(gain.mean(dtype=np.float64))
        return Difference(mean, standard_error(gain, self.clusters), interval, Histogram(HISTOGRAM_EDGES, counts))

    def breakdowns(self) -> tuple[Breakdown, ...]:
        """By frequency, occurrence and distance."""
        kinds = {
            "frequency": ("occurrences of the token in the datastore", frequency_parts(self.per_token.frequency)),
            "occurrence": ("where the token stood before", occurrence_parts([document.ids for document in self.text])),
            "distance": ("squared distance of the nearest neighbour, by decile", distance_parts(self.per_token.nearest)),
        }
        return tuple(breakdown(by, title, self.scores, self.clusters, parts) for by, (title, parts) in kinds.items())

    def reliability(self, best: str) -> Reliability:
        """Of the most probable tokens ``lm_best`` or ``best``."""
        right = getattr(self.per_token, best) == self.per_token.token_id
        return reliability(getattr(self.per_token, f"{best}_logprob"), right)

    def leakage(self, exclusion: Exclusion, found: Audit) -> Leakage:
        """What the audit found, with the figures of contaminated and clean tokens."""
        parts = [Part("contaminated", found.contaminated), Part("clean", ~found.contaminated)]
        apart = {group.name: group for group in groups(self.scores, self.clusters, parts)}
        contaminated, clean = apart.get("contaminated"), apart.get("clean")
        return Leakage(found.overlaps, contaminated, clean, found.documents, found.overlapping, exclusion.documents)

    def baseline(self, baseline: Baseline) -> ComparedBaseline:
        """A baseline beside base LM and kNN-LM."""
        change, interval = self.change(self.per_token.lm_logprob, baseline.mixed)
        knn_change, knn_interval = self.change(baseline.mixed, self.per_token.logprob)
        # A cache says nothing where it is empty; what it says of the rest counts.
        alone = perplexity(baseline.alone[~np.isnan(baseline.alone)])
        return ComparedBaseline(
            name=baseline.name,
            settings=baseline.settings,
            weight=baseline.weight.value,
            perplexity=self.perplexity(baseline.mixed),
            alone=alone,
            change=change,
            interval=interval,
            knn_change=knn_change,
            knn_interval=knn_interval,
            log_probs=baseline.mixed,
        )


def cost(seconds: Seconds, store_bytes: int, entries: int) -> Cost:
    """Shares of the time, and bytes for each of the datastore's ``entries``."""
    forward, search, mixing = (part / seconds.total for part in (seconds.forward, seconds.search, seconds.mixing))
    return Cost(forward, search, mixing, seconds.total, store_bytes, store_bytes / entries)
