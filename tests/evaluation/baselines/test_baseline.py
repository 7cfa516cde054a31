"""A baseline beside the LM: the mixture, its weight, and the same rows as a comparison."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from knnlm.errors import InvalidInput
from knnlm.evaluation.baselines.baseline import BaselineWeight, fit_weight, mixed_with_lm
from knnlm.evaluation.baselines.beside import cache_baseline, ngram_baseline
from knnlm.evaluation.baselines.continuous_cache import CacheSettings, QueryTape, cache_log_probs
from knnlm.evaluation.baselines.ngram import NGramModel
from knnlm.evaluation.compare import compare
from knnlm.evaluation.scoring import score
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

LM = np.log(np.array([0.5, 0.25, 0.1, 0.2], np.float32))
ALONE = np.array([np.log(0.9), -np.inf, np.nan, np.log(0.2)], np.float32)


def test_the_mixture_is_linear_and_the_lm_alone_where_there_is_nothing_to_say() -> None:
    found = mixed_with_lm("x", {}, ALONE, LM, BaselineWeight(0.4))
    np.testing.assert_allclose(np.exp(found.mixed), [0.4 * 0.9 + 0.6 * 0.5, 0.6 * 0.25, 0.1, 0.2], rtol=1e-6)
    assert found.mixed.dtype == np.float32


def test_weights_0_and_1() -> None:
    assert np.array_equal(mixed_with_lm("x", {}, ALONE, LM, BaselineWeight(0.0)).mixed, LM)
    alone = mixed_with_lm("x", {}, ALONE, LM, BaselineWeight(1.0)).mixed
    np.testing.assert_allclose(np.exp(alone), [0.9, 0, 0.1, 0.2], rtol=1e-6)
    with pytest.raises(InvalidInput, match=r"baseline weight: is 1\.5"):
        BaselineWeight(1.5)


def test_a_fitted_weight_is_the_best_of_a_grid() -> None:
    chance = np.random.default_rng(1)
    alone, lm = (np.log(chance.uniform(0.01, 1, 500)).astype(np.float32) for _ in range(2))
    fitted = fit_weight(alone, lm)
    losses = {weight: -mixed_with_lm("x", {}, alone, lm, BaselineWeight(weight)).mixed.mean() for weight in np.linspace(0, 1, 101)}
    assert fitted.source == "validation text"
    assert fitted.value == pytest.approx(min(losses, key=lambda weight: losses[weight]), abs=0.011)


@pytest.fixture(scope="module")
def opened(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenedKNNLM:
    folder = tmp_path_factory.mktemp("baselines")
    build(text_folder(folder / "corpus", tiny_corpus(30)), folder / "store", gpt2, index="Flat", max_length=16)
    return open_store(folder / "store")


def test_beside_a_comparison_both_have_its_rows(opened: OpenedKNNLM, tmp_path: Path) -> None:
    held = opened.read(opened.corpus(text_folder(tmp_path / "held", ["a", *tiny_corpus(3, seed=7)])))
    per_token = compare(opened.knn_lm, opened.store, held).per_token
    with QueryTape() as tape:
        batches = list(score(opened.knn_lm, [document.ids for document in held], opened.store.manifest.windowing, batch_tokens=50))
        for batch in batches:
            tape.record(batch.read)
        cache = cache_baseline(tape, held, per_token.lm_logprob, opened.knn_lm.mixture)
        expected = cache_log_probs(tape, held, CacheSettings(2000, 0.2))
    ngram = ngram_baseline(opened.store, held, per_token.lm_logprob)
    assert len(batches) > 1
    assert len(ngram.alone) == len(cache.alone) == len(per_token.token_id)
    np.testing.assert_array_equal(cache.alone, expected)
    assert np.isnan(cache.alone).sum() == sum(len(document.ids) > 1 for document in held)
    np.testing.assert_array_equal(ngram.alone, NGramModel.of_store(opened.store).log_probs([document.ids for document in held]))
    assert ngram.settings == {"order": 4, "smoothing": "modified Kneser-Ney", "tokens": opened.store.manifest.counts.tokens}
    assert cache.settings == {"size": 2000, "flatness": 0.2}
    # The tiny model was never trained, and the texts repeat themselves.
    for baseline in (ngram, cache):
        assert baseline.mixed.mean() > per_token.lm_logprob.mean()
        assert (baseline.weight.value, baseline.weight.source) == (0.2, "fixed")
