"""What is told about a token, with neighbours from two datastores whose documents have metadata."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from knnlm.datastore.reader import Datastore
from knnlm.distribution import log_weights
from knnlm.gated import RowWeights
from knnlm.knn_lm import Mixed, mix_neighbors
from knnlm.model import HFLanguageModel
from knnlm.neighbors import Neighbors
from knnlm_server.sequence import DetailParams, RetrievalParams
from knnlm_server.token_events import TokenReporter
from tests.stores import build
from tests.tiny import tiny_corpus

TEMPERATURE = 3.0
VOCABULARY = 300
SEARCHED = RetrievalParams(0.4, 6, TEMPERATURE)
EVERYTHING = DetailParams(log_probs=True, alternatives=4, neighbors=5)


@pytest.fixture(scope="module")
def model(tiny_gpt2_path: Path) -> HFLanguageModel:
    return HFLanguageModel.load(tiny_gpt2_path)


@pytest.fixture(scope="module")
def stores(model: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Two datastores by numbers that are not their places."""
    folder, found = tmp_path_factory.mktemp("events"), {}
    for number, name in ((3, "laws"), (8, "news")):
        lines = [
            {"id": f"{name}-{n}", "text": text, "title": f"{name} {n}", "year": 2000 + n}
            for n, text in enumerate(tiny_corpus(4, seed=number))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        build(folder / f"{name}.jsonl", folder / name, model, index="exact", keys="float32")
        found[number] = SimpleNamespace(name=name, store=Datastore.open(folder / name))
    return found


def mixed_from(stores: dict[int, Any]) -> tuple[torch.Tensor, Mixed]:
    """One row with six neighbours, of which the second datastore's count more than their distance says; one row without any."""
    lm = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    numbers, entries = [3, 3, 3, 8, 8, 8], [5, 40, 60, 7, 12, 30]
    tokens = [int(stores[number].store.values.slice(entry, entry + 1)[0]) for number, entry in zip(numbers, entries, strict=True)]
    found = Neighbors(
        torch.tensor([[1.0, 2.0, 9.0, 1.5, 2.5, 8.0], [math.inf] * 6]),
        torch.tensor([tokens, [0] * 6]),
        torch.tensor([entries, [-1] * 6]),
        torch.tensor([numbers, [-1] * 6]),
        torch.tensor([[math.log(0.25)] * 3 + [0.0] * 3, [0.0] * 6], dtype=torch.float64),
    )
    temperature = torch.full((2,), TEMPERATURE, dtype=torch.float64)
    return lm, mix_neighbors(lm, found, temperature=temperature, weights=RowWeights(torch.full((2,), SEARCHED.weight, dtype=torch.float64)))


def test_neighbours_come_heaviest_first_with_datastore_and_metadata(model: HFLanguageModel, stores: dict[int, Any]) -> None:
    lm, mixed = mixed_from(stores)
    reporter = TokenReporter(model.tokenizer(), stores.__getitem__)
    shown = reporter.details(0, 70, EVERYTHING, SEARCHED, lm, mixed)["neighbors"]
    expected = {(3, 5): 0.25 * math.exp(-1 / 3), (3, 40): 0.25 * math.exp(-2 / 3), (3, 60): 0.25 * math.exp(-9 / 3)}
    expected |= {(8, 7): math.exp(-1.5 / 3), (8, 12): math.exp(-2.5 / 3), (8, 30): math.exp(-8 / 3)}
    order = sorted(expected, key=lambda place: -expected[place])[:5]
    assert [(n.datastore, n.entry) for n in shown] == [(stores[number].name, entry) for number, entry in order]
    assert [n.weight for n in shown] == pytest.approx([expected[place] / sum(expected.values()) for place in order], rel=1e-6)
    for neighbor in shown:
        number = int(neighbor.document_id.rpartition("-")[2])
        assert neighbor.document_id == f"{neighbor.datastore}-{number}"
        assert neighbor.metadata == {"id": neighbor.document_id, "title": f"{neighbor.datastore} {number}", "year": 2000 + number}
        assert neighbor.text == model.tokenizer().token_text(neighbor.token_id)


def test_log_probs_are_those_of_mixture_base_model_and_neighbours(model: HFLanguageModel, stores: dict[int, Any]) -> None:
    lm, mixed = mixed_from(stores)
    reporter = TokenReporter(model.tokenizer(), stores.__getitem__)
    voted = int(mixed.neighbors.tokens[0, 0])
    for token in (voted, next(t for t in range(VOCABULARY) if t not in mixed.neighbors.tokens[0])):
        found = reporter.details(0, token, EVERYTHING, SEARCHED, lm, mixed)
        shares = log_weights(mixed.neighbors, TEMPERATURE).exp()[0]
        knn = float(shares[mixed.neighbors.tokens[0] == token].sum())
        p = 0.4 * knn + 0.6 * math.exp(lm[0, token])
        assert (math.exp(found["log_prob"]), math.exp(found["knn_log_prob"])) == pytest.approx((p, knn), rel=1e-5)
        assert (found["lm_log_prob"], found["knn_share"]) == pytest.approx((float(lm[0, token]), 0.4 * knn / p), rel=1e-5)
        assert found["interpolation_weight"] == 0.4


def test_alternatives_have_log_probs_where_those_were_asked_for(model: HFLanguageModel, stores: dict[int, Any]) -> None:
    lm, mixed = mixed_from(stores)
    reporter = TokenReporter(model.tokenizer(), stores.__getitem__)
    for asked in (True, False):
        detail = DetailParams(log_probs=asked, alternatives=4)
        shown = reporter.details(0, 70, detail, SEARCHED, lm, mixed)["alternatives"]
        assert [a.token_id for a in shown] == mixed.log_probs[0].topk(4).indices.tolist()
        for a in shown:
            assert a.log_prob == float(mixed.log_probs[0, a.token_id])
            assert a.lm_log_prob == (float(lm[0, a.token_id]) if asked else None)
            assert a.knn_log_prob == (float(mixed.knn_log_probs[0, a.token_id]) if asked else None)
    assert any(a.token_id in mixed.neighbors.tokens[0] for a in shown)


def test_a_search_that_found_nobody_is_told_from_none(model: HFLanguageModel, stores: dict[int, Any]) -> None:
    lm, mixed = mixed_from(stores)
    reporter = TokenReporter(model.tokenizer(), stores.__getitem__)
    unasked = replace(mixed, searched=torch.tensor([True, False]))
    for retrieval, step, knn in ((SEARCHED, mixed, -math.inf), (RetrievalParams(0.0, 6, TEMPERATURE), unasked, None)):
        found = reporter.details(1, 70, EVERYTHING, retrieval, lm, step)
        assert (found["knn_log_prob"], found["knn_share"], found["interpolation_weight"], found["neighbors"]) == (knn, 0.0, 0.0, ())
        assert found["log_prob"] == found["lm_log_prob"] == float(lm[1, 70])
        assert {a.knn_log_prob for a in found["alternatives"]} == {knn}


def test_nothing_is_told_that_was_not_asked_for(model: HFLanguageModel, stores: dict[int, Any]) -> None:
    lm, mixed = mixed_from(stores)
    found = TokenReporter(model.tokenizer(), stores.__getitem__).details(0, 70, DetailParams(), SEARCHED, lm, mixed)
    assert found == {"token_id": 70, "token_text": model.tokenizer().token_text(70)}
