"""``compare``: base LM and kNN-LM over the same tokens, with what is known of the difference, of leakage and of the cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.errors import CorpusError
from knnlm.evaluation.breakdowns import (
    Part,
    Scores,
    breakdown,
    distance_parts,
    frequency_parts,
    groups,
    occurrence_parts,
    token_counts,
)
from knnlm.evaluation.comparison import (
    Breakdown,
    Comparison,
    Cost,
    Difference,
    FloatArray,
    Histogram,
    Leakage,
    Perplexity,
    PerToken,
    Reliability,
)
from knnlm.evaluation.exclusion import Exclusion
from knnlm.evaluation.leakage import Audit, audit
from knnlm.evaluation.reliability import reliability
from knnlm.evaluation.statistics import Clusters, intervals_of_means, perplexity, relative, standard_error
from knnlm.evaluation.token_scores import Seconds, TokenScores, score_tokens
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.tokenized import TokenizedDocument

__all__ = ["Comparison", "compare"]

HISTOGRAM_EDGES = np.linspace(-4, 8, 121)


def compare(
    knn_lm: KNNLanguageModel,
    store: Datastore,
    documents: Iterable[TokenizedDocument],
    *,
    mixture: Mixture | None = None,
    exclude: Sequence[str] = (),
    auto_exclude: bool = True,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Score ``documents`` with the base LM and the mixture, windows as the store was built with.

    ``mixture``: None takes that of ``knn_lm``, with its gate where it has one. No search finds the documents of the datastore
    whose ids ``exclude`` names, nor, unless ``auto_exclude`` is False, those with the very tokens of one of ``documents``.
    ``progress`` is called with the number of tokens scored so far. Raises :class:`CorpusError` if no token can be scored,
    :class:`DocumentNotFound` for an id that the datastore does not have.
    """
    applied = (mixture or knn_lm.mixture).validate()
    text = list(documents)
    if not any(len(document.ids) > 1 for document in text):
        raise CorpusError("There is nothing to compare: no document has at least two tokens.")
    exclusion = Exclusion.choose(store, text, exclude, automatic=auto_exclude)
    searching = exclusion.apply(knn_lm, store)
    scored = score_tokens(searching, text, store.manifest.windowing, mixture, batch_tokens=batch_tokens, progress=progress)
    found = audit(store, text, exclusion)
    per_token = _per_token(scored, store, exclusion, found, knn_lm.model.vocabulary_size)
    return _Analysis(store, text, per_token, scored.seconds).comparison(
        applied, gated=mixture is None and knn_lm.gate is not None, exclusion=exclusion, found=found
    )


def _per_token(scored: TokenScores, store: Datastore, exclusion: Exclusion, found: Audit, vocabulary_size: int) -> PerToken:
    counts = token_counts(store.tokens, exclusion.token_ranges(store), vocabulary_size)
    frequency = counts[scored.columns["token_id"]]
    return PerToken(**scored.columns, frequency=frequency, contaminated=found.contaminated)


class _Analysis:
    """Everything that is said of one pass, from its arrays alone."""

    def __init__(self, store: Datastore, text: Sequence[TokenizedDocument], per_token: PerToken, seconds: Seconds) -> None:
        self._store, self._text, self._per_token, self._seconds = store, text, per_token, seconds
        self._scores = Scores(per_token.lm_logprob, per_token.logprob, per_token.weight)
        self._clusters = Clusters.among(per_token.doc, per_token.position)
        self._tokens = len(per_token.doc)

    def comparison(self, mixture: Mixture, *, gated: bool, exclusion: Exclusion, found: Audit) -> Comparison:
        """All of it."""
        per_token, difference = self._per_token, self._difference()
        base = self._perplexity(per_token.lm_logprob, self._seconds.forward)
        knn = self._perplexity(per_token.logprob, self._seconds.total)
        gain, ratio = self._scores.gain, knn.value / base.value
        return Comparison(
            documents=len(self._text),
            tokens=self._tokens,
            mixture=mixture,
            gated=gated,
            base=base,
            knn=knn,
            change=ratio - 1,
            change_standard_error=ratio * difference.standard_error,
            interval=relative(difference.interval),
            better=float((gain > 0).mean()),
            worse=float((gain < 0).mean()),
            mean_weight=float(per_token.weight.mean(dtype=np.float64)),
            skipped=float((~per_token.searched).mean()),
            clusters=self._clusters.name,
            cluster_count=self._clusters.count,
            difference=difference,
            breakdowns=self._breakdowns(),
            base_reliability=self._reliability("lm_best"),
            knn_reliability=self._reliability("best"),
            cost=self._cost(),
            leakage=self._leakage(exclusion, found),
            baselines={},
            per_token=per_token,
        )

    def _perplexity(self, log_probs: FloatArray, seconds: float) -> Perplexity:
        value = perplexity(log_probs)
        counts = [document.scored_bytes() for document in self._text]
        scored_bytes = None if None in counts else sum(count or 0 for count in counts)
        bits = -float(log_probs.sum(dtype=np.float64)) / math.log(2)
        error = value * standard_error(log_probs, self._clusters)
        return Perplexity(value, error, bits / scored_bytes if scored_bytes else None, self._tokens / seconds)

    def _difference(self) -> Difference:
        gain = self._scores.gain
        counts = np.histogram(np.clip(gain, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1]), HISTOGRAM_EDGES)[0]
        return Difference(
            float(gain.mean(dtype=np.float64)),
            standard_error(gain, self._clusters),
            intervals_of_means(gain, self._clusters)[0],
            Histogram(HISTOGRAM_EDGES, counts),
        )

    def _breakdowns(self) -> tuple[Breakdown, ...]:
        kinds = {
            "frequency": ("occurrences of the token in the datastore", frequency_parts(self._per_token.frequency)),
            "occurrence": ("where the token stood before", occurrence_parts([document.ids for document in self._text])),
            "distance": ("squared distance of the nearest neighbour, by decile", distance_parts(self._per_token.nearest)),
        }
        return tuple(breakdown(by, title, self._scores, self._clusters, parts) for by, (title, parts) in kinds.items())

    def _reliability(self, best: str) -> Reliability:
        right = getattr(self._per_token, best) == self._per_token.token_id
        return reliability(getattr(self._per_token, f"{best}_logprob"), right)

    def _cost(self) -> Cost:
        seconds, size = self._seconds, self._store.size_bytes()
        forward, search, mixing = (part / seconds.total for part in (seconds.forward, seconds.search, seconds.mixing))
        return Cost(forward, search, mixing, seconds.total, size, size / len(self._store))

    def _leakage(self, exclusion: Exclusion, found: Audit) -> Leakage:
        parts = [Part("contaminated", found.contaminated), Part("clean", ~found.contaminated)]
        apart = {group.name: group for group in groups(self._scores, self._clusters, parts)}
        return Leakage(
            found.overlaps, apart.get("contaminated"), apart.get("clean"), found.documents, found.overlapping, exclusion.documents
        )
