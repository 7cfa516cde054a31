"""``compare``: base LM and kNN-LM over the same tokens, with what is known of the difference, of leakage and of the cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from knnlm.datastore.reader import Datastore
from knnlm.errors import CorpusError, InvalidInput
from knnlm.evaluation.analysis import Analysis, cost
from knnlm.evaluation.baselines.baseline import Baseline
from knnlm.evaluation.baselines.beside import cache_baseline, ngram_baseline
from knnlm.evaluation.baselines.continuous_cache import QueryTape
from knnlm.evaluation.breakdowns import token_counts
from knnlm.evaluation.comparison import Comparison, FloatArray, PerToken
from knnlm.evaluation.exclusion import Exclusion
from knnlm.evaluation.leakage import Audit, audit
from knnlm.evaluation.token_scores import Seconds, TokenScores, score_tokens
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.tokenized import TokenizedDocument


def compare(
    knn_lm: KNNLanguageModel,
    store: Datastore,
    documents: Iterable[TokenizedDocument],
    *,
    mixture: Mixture | None = None,
    exclude: Sequence[str] = (),
    auto_exclude: bool = True,
    baselines: bool = False,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> Comparison:
    """Score ``documents`` with the base LM and the mixture, windows as the store was built with.

    ``mixture``: None takes that of ``knn_lm``, with its gate where it has one. No search finds the documents of the datastore
    whose ids ``exclude`` names, nor, unless ``auto_exclude`` is False, those with the very tokens of one of ``documents``.
    ``baselines``: score those of :mod:`knnlm.evaluation.baselines`, too. ``progress`` is called with the number of tokens scored
    so far. Raises :class:`CorpusError` if no token can be scored, :class:`DocumentNotFound` for an id that the datastore does
    not have.
    """
    applied = (mixture or knn_lm.mixture).validate()
    text = list(documents)
    if not any(len(document.ids) > 1 for document in text):
        raise CorpusError("There is nothing to compare: no document has at least two tokens.")
    exclusion = Exclusion.choose(store, text, exclude, automatic=auto_exclude)
    with ExitStack() as stack:
        tape = stack.enter_context(QueryTape()) if baselines else None
        scored = score_tokens(
            exclusion.apply(knn_lm, store),
            text,
            store.manifest.windowing,
            mixture,
            batch_tokens=batch_tokens,
            progress=progress,
            watch=tape.record if tape else lambda batch: None,
        )
        beside, left_out = _baselines(store, text, scored, applied, exclusion, tape) if tape else ([], {})
    found = audit(store, text, exclusion)
    analysis = Analysis.of(text, _per_token(scored, store, exclusion, found, knn_lm.model.vocabulary_size))
    gated = mixture is None and knn_lm.gate is not None
    return _comparison(analysis, scored.seconds, store, applied, gated, exclusion, found, beside, left_out)


def _per_token(scored: TokenScores, store: Datastore, exclusion: Exclusion, found: Audit, vocabulary_size: int) -> PerToken:
    counts = token_counts(store.tokens, exclusion.token_ranges(store), vocabulary_size)
    frequency = counts[scored.columns["token_id"]]
    return PerToken(**scored.columns, frequency=frequency, contaminated=found.contaminated)


def _baselines(
    store: Datastore, text: list[TokenizedDocument], scored: TokenScores, mixture: Mixture, exclusion: Exclusion, tape: QueryTape
) -> tuple[list[Baseline], dict[str, str]]:
    """Those that could be scored, and why others could not."""
    lm: FloatArray = scored.columns["lm_logprob"]
    cache = cache_baseline(tape, text, lm, mixture)
    try:
        return [ngram_baseline(store, text, lm, without=exclusion.rows.tolist()), cache], {}
    except InvalidInput as error:
        return [cache], {"n-gram": error.problem}


def _comparison(
    analysis: Analysis,
    seconds: Seconds,
    store: Datastore,
    mixture: Mixture,
    gated: bool,
    exclusion: Exclusion,
    found: Audit,
    beside: list[Baseline],
    left_out: dict[str, str],
) -> Comparison:
    per_token, difference, gain = analysis.per_token, analysis.difference(), analysis.scores.gain
    change, interval = analysis.change(per_token.lm_logprob, per_token.logprob)
    return Comparison(
        documents=len(analysis.text),
        tokens=len(gain),
        mixture=mixture,
        gated=gated,
        base=analysis.perplexity(per_token.lm_logprob, seconds.forward),
        knn=analysis.perplexity(per_token.logprob, seconds.total),
        change=change,
        change_standard_error=(1 + change) * difference.standard_error,
        interval=interval,
        better=float((gain > 0).mean()),
        worse=float((gain < 0).mean()),
        mean_weight=float(per_token.weight.mean(dtype=float)),
        skipped=float((~per_token.searched).mean()),
        clusters=analysis.clusters.name,
        cluster_count=analysis.clusters.count,
        difference=difference,
        breakdowns=analysis.breakdowns(),
        base_reliability=analysis.reliability("lm_best"),
        knn_reliability=analysis.reliability("best"),
        cost=cost(seconds, store.size_bytes(), len(store)),
        leakage=analysis.leakage(exclusion, found),
        baselines={each.name: analysis.baseline(each) for each in beside},
        baselines_left_out=left_out,
        per_token=per_token,
    )
