"""A neighbour cache holds what LM and search say of each token; it goes on after a kill and belongs to one thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from knnlm.corpus import Corpus
from knnlm.errors import CorpusError, StoreDamaged, StoreMismatch
from knnlm.evaluation import neighbor_cache
from knnlm.evaluation.neighbor_cache import CachedTokens, NeighborCache, fill_cache, open_cache
from knnlm.evaluation.scoring import score
from knnlm.mixture import Mixture
from knnlm.model import HFLanguageModel
from knnlm.opening import OpenedKNNLM, open_store
from knnlm.tokenized import TokenizedDocument, tokenize
from tests.stores import build, text_folder
from tests.tiny import tiny_corpus

K = 12


@pytest.fixture(scope="module")
def opened(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> OpenedKNNLM:
    folder = tmp_path_factory.mktemp("cache")
    settings: dict[str, Any] = {"index": "Flat", "keys": "float32", "max_length": 16, "stride": 6}
    build(text_folder(folder / "corpus", tiny_corpus(4)), folder / "store", gpt2, **settings)
    return open_store(folder / "store")


@pytest.fixture(scope="module")
def held(opened: OpenedKNNLM, tmp_path_factory: pytest.TempPathFactory) -> list[TokenizedDocument]:
    folder = text_folder(tmp_path_factory.mktemp("held") / "held", ["a", *tiny_corpus(3, seed=7), "Zoë laughed.", "so it", "b"])
    return list(tokenize(Corpus([folder]), opened.knn_lm.tokenizer, opened.model.vocabulary_size))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short text has several."""
    monkeypatch.setattr(neighbor_cache, "TOKENS_OF_PART", 60)


def fill(folder: Path, opened: OpenedKNNLM, held: list[TokenizedDocument], k: int = K, **options: Any) -> NeighborCache:
    return fill_cache(folder, opened, held, k, **options)


def whole(cache: NeighborCache) -> CachedTokens:
    parts = list(cache.parts())
    return CachedTokens(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@pytest.mark.usefixtures("small_parts")
def test_it_holds_what_one_pass_finds(tmp_path: Path, opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    cache = fill(tmp_path / "cache", opened, held)
    found = whole(cache)
    assert cache.facts["parts"] > 2
    assert len(found) == cache.tokens == sum(len(document.ids) - 1 for document in held)
    np.testing.assert_array_equal(found.target, np.concatenate([document.ids[1:] for document in held]))
    np.testing.assert_array_equal(found.position, np.concatenate([np.arange(1, len(document.ids)) for document in held]))
    np.testing.assert_array_equal(found.document, np.repeat(np.arange(len(held)), [len(document.ids) - 1 for document in held]))
    windowing = opened.store.manifest.windowing
    for batch in score(opened.knn_lm, [document.ids for document in held], windowing, Mixture(k=K, weight=0.5)):
        rows = batch.rows.numpy()
        np.testing.assert_allclose(found.lm_log_prob[rows], batch.lm_log_probs, atol=1e-5)
        np.testing.assert_array_equal(found.ids[rows], batch.neighbors.ids)
        np.testing.assert_array_equal(found.tokens[rows], batch.neighbors.tokens)
        np.testing.assert_allclose(found.distances[rows], batch.neighbors.distances, atol=1e-4)


def test_what_it_says_of_the_lm(tmp_path: Path, opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    """Documents that fit one window, read whole."""
    found = whole(fill(tmp_path / "cache", opened, held))
    for number, document in enumerate(held):
        if not 2 <= len(document.ids) <= 6:
            continue
        ids = torch.from_numpy(document.ids.astype(np.int64))[None]
        logits = opened.model.forward(ids[:, :-1]).logits
        assert logits is not None
        log_probs = logits[0].double().log_softmax(-1).numpy()
        rows = np.flatnonzero(found.document == number)
        probabilities = np.exp(log_probs)
        np.testing.assert_allclose(found.lm_entropy[rows], -(probabilities * log_probs).sum(1), rtol=1e-4)
        np.testing.assert_allclose(found.lm_max_log_prob[rows], log_probs.max(1), atol=1e-4)
        np.testing.assert_array_equal(found.lm_argmax[rows], log_probs.argmax(1))
        of_target = log_probs[np.arange(len(rows)), document.ids[1:]]
        np.testing.assert_array_equal(found.lm_rank[rows], (log_probs > of_target[:, None]).sum(1))
        np.testing.assert_allclose(found.neighbor_lm_log_probs[rows], np.take_along_axis(log_probs, found.tokens[rows], 1), atol=1e-4)
        break
    else:
        pytest.fail("no document is short enough")


@pytest.mark.usefixtures("small_parts")
def test_it_goes_on_where_it_was_killed(
    tmp_path: Path, opened: OpenedKNNLM, held: list[TokenizedDocument], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = whole(fill(tmp_path / "undisturbed", opened, held))
    written = neighbor_cache._write_part
    parts: list[Path] = []

    def killed(path: Path, *arguments: Any) -> Iterator[int]:
        if len(parts) == 2:
            path.with_name(path.name + ".tmp").mkdir()
            raise KeyboardInterrupt
        parts.append(path)
        yield from written(path, *arguments)

    monkeypatch.setattr(neighbor_cache, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "cache", opened, held)
    with pytest.raises(StoreDamaged, match="part-00002 is missing"):
        open_cache(tmp_path / "cache")
    made = {path: (path / "ids.npy").stat().st_mtime_ns for path in parts}
    monkeypatch.setattr(neighbor_cache, "_write_part", written)
    resumed = whole(fill(tmp_path / "cache", opened, held))
    assert {path: (path / "ids.npy").stat().st_mtime_ns for path in parts} == made
    for name, values in vars(undisturbed).items():
        np.testing.assert_array_equal(getattr(resumed, name), values, err_msg=name)
    assert len(whole(open_cache(tmp_path / "cache"))) == len(undisturbed)


def test_another_text_another_k_another_store(tmp_path: Path, opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    fill(tmp_path / "cache", opened, held)
    with pytest.raises(StoreMismatch, match="its k is 12, not 5"):
        fill(tmp_path / "cache", opened, held, k=5)
    with pytest.raises(StoreMismatch, match=r"its (tokens|text) is"):
        fill(tmp_path / "cache", opened, held[:-3])
    with pytest.raises(CorpusError, match="no document has at least two tokens"):
        fill(tmp_path / "other", opened, held[:1])


def test_damage_is_named(tmp_path: Path, opened: OpenedKNNLM, held: list[TokenizedDocument]) -> None:
    with pytest.raises(StoreDamaged, match=r"cache\.json is missing"):
        open_cache(tmp_path)
    cache = fill(tmp_path / "cache", opened, held)
    file = tmp_path / "cache" / "part-00000" / "distances.npy"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StoreDamaged, match=r"distances\.npy"):
        list(cache.parts())
