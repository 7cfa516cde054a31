"""However a text is scored, it is scored the same: batches, their order, threads, a key-value cache, tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from knnlm.datastore.profile import Profile
from knnlm.evaluation.compare import compare
from knnlm.evaluation.scoring import score
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument
from tests.gates import tiny_gate
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

MEAN, TOKEN = 1e-5, 1e-3  # nats; the latter at the 99.5th percentile
Scores = np.ndarray[tuple[int], np.dtype[np.float64]]


@pytest.fixture(scope="module", params=["float16", "float32"])
def opened(request: pytest.FixtureRequest, gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenedKNNLM:
    """A datastore whose profile has a gate, with keys of both kinds."""
    folder: Path = tmp_path_factory.mktemp("equal")
    store = folder / "store"
    build(text_folder(folder / "corpus", tiny_corpus(12)), store, gpt2, index="IVF8,SQ8", keys=request.param, max_length=32, stride=16)
    Profile(Mixture(16, 5.0, 0.4), "exact", "the test", gate=tiny_gate(6)).write(store)
    return open_store(store)


@pytest.fixture(scope="module")
def documents(opened: OpenedKNNLM, tmp_path_factory: pytest.TempPathFactory) -> list[TokenizedDocument]:
    folder = text_folder(tmp_path_factory.mktemp("held") / "held", [*tiny_corpus(5, seed=9), tiny_corpus(1)[0]])
    return opened.read(opened.corpus(folder))


def scores(opened: OpenedKNNLM, documents: list[TokenizedDocument], mixture: Mixture | None, *, batch_tokens: int = 2048) -> Scores:
    """Log-probabilities in document order; documents come one by one, as from a stream."""
    found = np.full(sum(len(document.ids) - 1 for document in documents), np.nan)

    def stream() -> Iterator[np.ndarray[tuple[int], np.dtype[np.int32]]]:
        for document in documents:
            yield document.ids

    for batch in score(opened.knn_lm, stream(), opened.store.manifest.windowing, mixture, batch_tokens=batch_tokens):
        found[batch.rows.numpy()] = batch.log_probs.numpy()
    assert not np.isnan(found).any()
    return found


def shuffled(opened: OpenedKNNLM, documents: list[TokenizedDocument], mixture: Mixture | None) -> Scores:
    order = np.random.default_rng(3).permutation(len(documents))
    found = scores(opened, [documents[at] for at in order], mixture, batch_tokens=100)
    cuts = np.cumsum([len(documents[at].ids) - 1 for at in order])[:-1]
    return np.concatenate([part for _, part in sorted(zip(order.tolist(), np.split(found, cuts), strict=True), key=lambda pair: pair[0])])


def other_threads(opened: OpenedKNNLM, documents: list[TokenizedDocument], mixture: Mixture | None) -> Scores:
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        return scores(opened, documents, mixture)
    finally:
        torch.set_num_threads(before)


def compared(opened: OpenedKNNLM, documents: list[TokenizedDocument], mixture: Mixture | None) -> Scores:
    return compare(opened.knn_lm, opened.store, documents, mixture=mixture).per_token.logprob.astype(np.float64)


def small_batches(opened: OpenedKNNLM, documents: list[TokenizedDocument], mixture: Mixture | None) -> Scores:
    return scores(opened, documents, mixture, batch_tokens=1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("way", [shuffled, other_threads, compared, small_batches])
def test_every_way_scores_the_same(
    opened: OpenedKNNLM, documents: list[TokenizedDocument], gated: bool, way: Callable[..., Scores]
) -> None:
    mixture = None if gated else opened.knn_lm.mixture
    expected, found = scores(opened, documents, mixture), way(opened, documents, mixture)
    assert found.shape == expected.shape
    assert abs(found.mean() - expected.mean()) <= MEAN
    assert np.quantile(np.abs(found - expected), 0.995) <= TOKEN
    assert not gated or abs(expected - scores(opened, documents, opened.knn_lm.mixture)).max() > 0.01


@pytest.mark.parametrize("gated", [True, False])
def test_tokens_one_by_one_with_a_cache_score_the_same(opened: OpenedKNNLM, documents: list[TokenizedDocument], gated: bool) -> None:
    """As generation reads them; within the first window, where both have the same context."""
    mixture = None if gated else opened.knn_lm.mixture
    expected, found = [], []
    for document in documents:
        first = replace(document, ids=document.ids[:16], spans=None)
        expected.append(scores(opened, [first], mixture))
        tokens, cache = first.ids.tolist(), DynamicCache()
        for at in range(1, len(tokens)):
            mixed = opened.knn_lm.next_token(tokens[at - 1 : at], mixture, cache=cache, before=tokens[: at - 1])
            found.append(float(mixed.log_probs[0, tokens[at]]))
    difference = np.array(found) - np.concatenate(expected)
    assert abs(difference.mean()) <= MEAN
    assert np.quantile(np.abs(difference), 0.995) <= TOKEN
