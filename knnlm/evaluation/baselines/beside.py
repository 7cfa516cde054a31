"""The baselines as ``compare`` shows them beside the kNN-LM, with settings that no test text chose."""

from __future__ import annotations

from collections.abc import Sequence

from knnlm.datastore.reader import Datastore
from knnlm.evaluation.baselines.baseline import Baseline, BaselineWeight, FloatArray, mixed_with_lm
from knnlm.evaluation.baselines.continuous_cache import CacheSettings, QueryTape, cache_log_probs
from knnlm.evaluation.baselines.ngram import ORDER, NGramModel
from knnlm.mixture import Mixture
from knnlm.tokenized import TokenizedDocument

FIXED = BaselineWeight(Mixture().weight)
"""Where no validation text fits a weight: the default of the kNN-LM itself."""


def ngram_baseline(
    store: Datastore,
    documents: Sequence[TokenizedDocument],
    lm: FloatArray,
    *,
    weight: BaselineWeight = FIXED,
    order: int = ORDER,
    without: Sequence[int] = (),
) -> Baseline:
    """An n-gram from the live tokens of ``store``, but the documents numbered ``without``, beside the LM's log-probabilities
    ``lm`` [tokens] of ``documents``. Raises :class:`InvalidInput` for a store that is too large to count."""
    model = NGramModel.of_store(store, order, without=without)
    settings = {"order": order, "smoothing": "modified Kneser-Ney", "tokens": model.tokens}
    return mixed_with_lm(f"{order}-gram", settings, model.log_probs([document.ids for document in documents]), lm, weight)


def cache_baseline(
    tape: QueryTape,
    documents: Sequence[TokenizedDocument],
    lm: FloatArray,
    mixture: Mixture,
    *,
    weight: BaselineWeight = FIXED,
    settings: CacheSettings | None = None,
) -> Baseline:
    """A continuous cache over the queries on ``tape``, beside the LM's log-probabilities ``lm`` [tokens] of ``documents``.

    ``settings``: None for those that ``mixture``, the datastore's, suggests.
    """
    chosen = settings or CacheSettings.of(mixture)
    alone = cache_log_probs(tape, documents, chosen)
    return mixed_with_lm("continuous cache", {"size": chosen.size, "flatness": chosen.flatness}, alone, lm, weight)
