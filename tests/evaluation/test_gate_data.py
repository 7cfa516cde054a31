"""What a gate learns from a cache is what serving computes: the same features, number by number, for any k that the cache holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnlm.corpus import Corpus
from knnlm.distribution import neighbor_token_log_probs
from knnlm.evaluation.gate_data import GateData, cached_features, gate_data
from knnlm.evaluation.neighbor_cache import NeighborCache, fill_cache
from knnlm.evaluation.scoring import read, score
from knnlm.following import followed_lengths
from knnlm.gate import FEATURES, Gate, LMSummary, Network, SkipRule, gate_features
from knnlm.gated import StoreGate
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument, tokenize
from tests.evaluation.test_mixture_fit import MadeUp, made_up
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

K = 12


@pytest.fixture(scope="module")
def opened(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenedKNNLM:
    folder = tmp_path_factory.mktemp("gate-data")
    settings: dict[str, Any] = {"index": "Flat", "keys": "float32", "max_length": 16, "stride": 6}
    build(text_folder(folder / "corpus", tiny_corpus(4)), folder / "store", gpt2, **settings)
    return open_store(folder / "store")


@pytest.fixture(scope="module")
def held(opened: OpenedKNNLM, tmp_path_factory: pytest.TempPathFactory) -> list[TokenizedDocument]:
    folder = text_folder(tmp_path_factory.mktemp("held") / "held", [*tiny_corpus(3, seed=7), "so it"])
    return list(tokenize(Corpus([folder]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))


@pytest.fixture(scope="module")
def cache(opened: OpenedKNNLM, held: list[TokenizedDocument], tmp_path_factory: pytest.TempPathFactory) -> NeighborCache:
    return fill_cache(tmp_path_factory.mktemp("cache") / "own", opened, held, K)


@pytest.mark.parametrize("k", [1, 3, 8, K])
@pytest.mark.parametrize("temperature", [0.05, 7.0])
def test_features_are_those_of_serving(
    opened: OpenedKNNLM, held: list[TokenizedDocument], cache: NeighborCache, k: int, temperature: float
) -> None:
    found = gate_data(cache, k, temperature).features
    assert found.dtype == torch.float64
    assert bool((found[:, FEATURES.index("followed")] > 0).any())
    for batch in read(opened.model, [document.ids for document in held], opened.store.manifest.windowing):
        neighbors = opened.retriever.retrieve(batch.queries, k)
        live = gate_features(
            LMSummary.of(batch.log_probs),
            neighbors,
            neighbor_token_log_probs(neighbors, temperature),
            batch.log_probs.gather(1, neighbors.tokens),
            followed_lengths(batch.contexts, neighbors, opened.store),
        )
        torch.testing.assert_close(found[batch.rows], live, rtol=0, atol=0)


def test_a_gate_mixes_as_the_cache_says(opened: OpenedKNNLM, held: list[TokenizedDocument], cache: NeighborCache) -> None:
    data = gate_data(cache, 5, 4.0)
    means, scales = data.features.mean(0), data.features.std(0) + 1
    outgoing = tuple(np.random.default_rng(3).normal(size=len(FEATURES)).tolist())
    form = Network(tuple(means.tolist()), tuple(scales.tolist()), (((outgoing,), (0.0,)),))
    entropy = float(data.lm_features[:, 0].median())
    skip = SkipRule(Network((entropy, 0.0), (1.0, 1.0), ((((1.0, 0.0),), (0.0,)),)), 0.45)
    gate = Gate(form, 0.3, skip)
    weights = gate.weights(data.features)
    weights[gate.skips(data.lm_features)] = 0.0
    assert 0 < float((weights == 0).double().mean()) < 1
    wanted = data.log_probs(weights.numpy())
    gated = KNNLanguageModel(opened.model, opened.knn_lm.tokenizer, opened.retriever, Mixture(5, 4.0, 0.5), StoreGate(gate, opened.store))
    for batch in score(gated, [document.ids for document in held], opened.store.manifest.windowing):
        np.testing.assert_allclose(batch.weight, weights[batch.rows], atol=1e-12)
        np.testing.assert_allclose(batch.log_probs, wanted[batch.rows.numpy()], atol=1e-5)


def test_shuffled_contexts_are_measured_from_their_own_queries(
    opened: OpenedKNNLM, held: list[TokenizedDocument], cache: NeighborCache, tmp_path: Path
) -> None:
    shuffled = fill_cache(tmp_path / "shuffled", opened, held, K, shuffled=True)
    own, other = next(cache.parts()), next(shuffled.parts())
    np.testing.assert_array_equal(other.target, own.target)
    np.testing.assert_array_equal(other.lm_log_prob, own.lm_log_prob)
    assert (other.distances[:, 0] >= own.distances[:, 0]).all(), "no entry is nearer than the nearest"
    assert other.distances.mean() > own.distances.mean()
    assert (np.diff(other.distances, axis=1) >= 0).all()
    assert (other.tokens == own.target[:, None]).mean() < (own.tokens == own.target[:, None]).mean()
    keys = opened.store.keys
    assert keys is not None
    for batch in read(opened.model, [document.ids for document in held], opened.store.manifest.windowing):
        entries = torch.from_numpy(np.array(other.ids[batch.rows.numpy()]))
        exact = (keys.gather(entries.flatten()).float().view(*entries.shape, -1) - batch.queries[:, None]).square().sum(2)
        np.testing.assert_allclose(other.distances[batch.rows.numpy()], exact, rtol=1e-4, atol=1e-4)


def test_rows_without_neighbours_have_the_features_of_the_lm_alone() -> None:
    part = made_up(60, 6, 1)
    part.lm_entropy[:], part.lm_max_log_prob[:], part.lm_argmax[:], part.neighbor_lm_log_probs[:], part.followed[:] = 1, -1, 2, -3, 0
    none = (part.ids < 0).all(1)
    assert none.any()
    found = cached_features(part, 6, 5.0)
    assert bool(found.isfinite().all())
    assert bool((found[torch.from_numpy(none)][:, 2:] == 0).all())
    data = gate_data(MadeUp(part), 6, 5.0)
    np.testing.assert_array_equal(data.log_probs(0.7)[none], data.lm[none])
    np.testing.assert_array_equal(np.isnan(data.knn), none)


def test_groups_are_documents_or_stretches() -> None:
    def of(document: Any, position: Any) -> GateData:
        n = len(document)
        return GateData(torch.zeros(n, 13, dtype=torch.float64), np.zeros(n), np.zeros(n), np.array(document), np.array(position))

    few = of([0, 0, 0, 1], [1, 1023, 1024, 1])
    np.testing.assert_array_equal(few.groups, [[0, 0], [0, 0], [0, 1], [1, 0]])
    many = of(range(20), [5000] * 20)
    np.testing.assert_array_equal(many.groups, [[number, 0] for number in range(20)])
    both = GateData.joined([few, many])
    assert len(both) == 24
    np.testing.assert_array_equal(both.rows(np.array([0, 23])).position, [1, 5000])
