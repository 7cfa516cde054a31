"""Gates fitted to made-up tokens: against slow references, useless and all-useful datastores, and edges."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.evaluation import gate_choice, gate_fit
from knnlm.evaluation.gate_choice import choose_gate
from knnlm.evaluation.gate_data import GateData
from knnlm.evaluation.gate_fit import (
    NEGATIVE_SHARES,
    best_floor,
    buckets_held_out,
    fit_buckets,
    fixed_held_out,
    fold_numbers,
    lesson,
    network_held_out,
)
from knnlm.evaluation.gate_network import Examples, fit_epochs, log_gain, mixture_loss, squared_loss
from knnlm.evaluation.mixture_fit import best_weight
from knnlm.evaluation.skip_fit import MOST_LOSS, fit_skip_rule, skip_points
from knnlm.gate import FEATURES, DistanceBuckets, Gate, Network

NEAREST = FEATURES.index("nearest")


def tokens(n: int, seed: int = 0, helpful: float | None = None, documents: int = 25, missing: float = 0.05) -> GateData:
    """Tokens whose neighbours know the target the more often the nearer they are; with ``helpful`` always or never."""
    random = np.random.default_rng(seed)
    features = torch.from_numpy(random.normal(size=(n, len(FEATURES))))
    nearest = random.uniform(-2, 2, n)
    features[:, NEAREST] = torch.from_numpy(nearest)
    knows = random.random(n) < (1 / (1 + np.exp(3 * nearest)) if helpful is None else helpful)
    knn = np.where(knows, np.log(random.uniform(0.3, 0.9, n)), -np.inf)
    knn[random.random(n) < missing] = np.nan
    lm = np.log(random.uniform(0.01, 0.3, n))
    # The LM's first feature says how sure it is, so that there is something to skip.
    features[:, 0] = torch.from_numpy(lm)
    return GateData(features, lm, knn, np.sort(random.integers(0, documents, n)), np.arange(n))


@given(seed=st.integers(0, 50), count=st.sampled_from([1, 2, 5, 64]))
@settings(max_examples=20)
def test_buckets_against_a_fine_grid(seed: int, count: int) -> None:
    data = tokens(400, seed)
    random = np.random.default_rng(seed)
    importance = random.uniform(0.2, 2, len(data))
    form = fit_buckets(data, importance, count)
    assert len(form.weights) <= count
    weights, places = form(data.features).numpy(), form.places(data.features).numpy()
    nearest = np.exp(data.features[:, NEAREST].numpy())
    for number, weight in enumerate(form.weights):
        low = 0.0 if number == 0 else form.edges[number - 1]
        high = np.inf if number == len(form.edges) else form.edges[number]
        rows = (places == number) & ~np.isnan(data.knn)
        assert rows.sum() >= 40
        # Up to the rounding of a logarithm.
        assert ((nearest[rows] > low * (1 - 1e-12)) & (nearest[rows] <= high * (1 + 1e-12))).all()
        np.testing.assert_allclose(weights[rows], weight)

        def slow(value: float, rows: Any = rows) -> float:
            mixed = [math.log(value * math.exp(b) + (1 - value) * math.exp(a)) for a, b in zip(data.lm[rows], data.knn[rows], strict=True)]
            return -float(np.dot(mixed, importance[rows]))

        assert slow(weight) <= min(slow(other) for other in np.linspace(0, 0.99, 100)) + 1e-6


def test_buckets_of_equal_distances_and_of_none() -> None:
    data = tokens(200)
    data.features[:, NEAREST] = 1.0
    assert len(fit_buckets(data, np.ones(200), 16).weights) <= 2
    nothing = replace(data, knn=np.full(200, np.nan))
    assert fit_buckets(nothing, np.ones(200), 4) == DistanceBuckets((), (0.0,))


def test_the_loss_is_the_mixtures() -> None:
    data = tokens(300, 4)
    weights = np.random.default_rng(1).uniform(0, 1, 300)
    slow = [
        0.0 if math.isnan(knn) else math.log(math.exp(lm) / (weight * math.exp(knn) + (1 - weight) * math.exp(lm)))
        for weight, lm, knn in zip(weights, data.lm, data.knn, strict=True)
    ]
    found = mixture_loss(torch.from_numpy(weights), log_gain(data.lm, data.knn))
    np.testing.assert_allclose(found, slow, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(data.log_probs(weights), data.lm - slow, rtol=1e-9)
    assert bool(mixture_loss(torch.tensor([0.0, 1.0]).double(), torch.tensor([-1.0, -1.0]).double()).isfinite().all())


@pytest.mark.parametrize("hidden", [(), (6,)])
def test_fitting_is_better_than_one_weight_and_better_with_every_few_epochs(hidden: tuple[int, ...]) -> None:
    data = tokens(1500, 1)
    taught = lesson(data, None, [])
    start, _ = best_weight(data.lm, data.knn)
    networks = fit_epochs(taught.examples(np.ones(1500, bool)), hidden, start, epochs=12)
    losses = [taught.loss(network(data.features).numpy()) for network in networks]
    assert losses[-1] < taught.loss(np.full(1500, start)) - 0.01
    assert losses[11] < losses[5] < losses[0]


def test_the_same_whatever_the_threads() -> None:
    taught = lesson(tokens(600, 2), None, [])
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(fit_epochs(taught.examples(np.ones(600, bool)), (5,), 0.2, epochs=4)[-1])
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_a_feature_that_never_changes_has_no_say() -> None:
    data = tokens(300)
    data.features[:, 5] = 7.0
    network = fit_epochs(Examples(data.features, log_gain(data.lm, data.knn), torch.ones(300)), (4,), 0.3, epochs=2)[-1]
    other = data.features.clone()
    other[:, 5] = -1000.0
    torch.testing.assert_close(network(other), network(data.features), atol=1e-4, rtol=0)


def test_a_network_that_predicts_numbers() -> None:
    features = torch.linspace(-1, 1, 800, dtype=torch.float64)[:, None]
    wanted = (2 * features[:, 0]).sigmoid()
    network = fit_epochs(Examples(features, wanted, torch.ones(800)), (), 0.5, squared_loss, epochs=20)[-1]
    torch.testing.assert_close(network(features), wanted, atol=0.03, rtol=0)


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=30))
def test_folds_keep_documents_whole(sizes: list[int]) -> None:
    groups = np.stack([np.repeat(np.arange(len(sizes)), sizes), np.zeros(sum(sizes), int)], axis=1)
    fold, folds = fold_numbers(groups)
    assert folds == min(4, len(sizes))
    assert set(fold) == set(range(folds))
    for number in range(len(sizes)):
        assert len(set(fold[groups[:, 0] == number])) == 1


def test_shares_of_what_is_negative() -> None:
    useful, shuffled, other = tokens(400), tokens(100, helpful=0.0), tokens(900, 3, helpful=0.0)
    taught = lesson(useful, shuffled, [other])
    shares = [taught.importance[taught.part == part].sum() / len(taught.data) for part in range(3)]
    np.testing.assert_allclose(shares, [1 - NEGATIVE_SHARES[0], NEGATIVE_SHARES[0] / 2, NEGATIVE_SHARES[0] / 2])
    assert taught.importance.mean() == pytest.approx(1)
    # Shuffled contexts of a document are judged with the document; another text's documents are others.
    of_useful = dict(zip(useful.document, taught.fold[taught.part == 0], strict=True))
    assert [of_useful[number] for number in shuffled.document] == taught.fold[taught.part == 1].tolist()
    alone = lesson(useful, None, [])
    np.testing.assert_array_equal(alone.importance, 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer epochs, and one number of buckets."""
    monkeypatch.setattr(gate_fit, "BUCKETS", (4,))
    monkeypatch.setattr(gate_fit, "EPOCHS", 10)


@pytest.mark.usefixtures("quick")
def test_a_useless_datastore_gets_no_weight() -> None:
    data = tokens(800, helpful=0.0)
    assert not fixed_held_out(lesson(data, None, [])).any()
    choice = choose_gate(data, None, {})
    assert choice is not None
    assert choice.gate is None, "no gate beats the LM alone"
    assert choice.zeros == 1
    assert choice.fixed.perplexity == choice.base.perplexity


@pytest.mark.usefixtures("quick")
def test_a_datastore_that_knows_all_gets_much() -> None:
    data = tokens(800, helpful=1.0, missing=0.0)
    taught = lesson(data, None, [])
    start, _ = best_weight(data.lm, data.knn)
    assert network_held_out(taught, "logistic function", start).held_out.mean() > 0.85
    assert buckets_held_out(taught).held_out.mean() > 0.9


@pytest.mark.usefixtures("quick")
def test_negatives_teach_where_neighbours_are_of_no_use() -> None:
    """What is negative lies elsewhere in a feature that says nothing of the validation text."""
    useful, other = tokens(1500, 1), tokens(600, 2, helpful=0.0)
    useful.features[:, 8] = torch.from_numpy(np.random.default_rng(1).normal(0, 0.5, len(useful)))
    other.features[:, 8] = 4.0
    choice = choose_gate(useful, None, {"other": other})
    assert choice is not None
    assert choice.gate is not None
    new = tokens(400, 9, helpful=0.0)
    new.features[:, 8] = 4.0
    weights = choice.gate.weights(new.features).numpy()
    assert weights.mean() < 0.02
    (judged,) = choice.negatives
    assert judged.name == "other"
    assert abs(judged.change) < 0.02
    alone = choose_gate(useful, None, {})
    assert alone is not None
    assert alone.gate is not None
    assert alone.gate.weights(new.features).mean() > 0.1


@pytest.mark.usefixtures("quick")
def test_the_choice_is_deterministic_and_goes_through_json() -> None:
    data = tokens(1500, 5)
    choice = choose_gate(data, None, {})
    assert choice == choose_gate(data, None, {})
    assert choice is not None
    assert choice.gate is not None
    again = Gate.of(json.loads(json.dumps(choice.gate.content())))
    assert again == choice.gate
    torch.testing.assert_close(again.weights(data.features), choice.gate.weights(data.features), rtol=0, atol=0)
    names = [judged.name for judged in choice.forms]
    assert names == ["distance buckets", "logistic function", "network"]
    best = min(choice.forms, key=lambda judged: judged.perplexity)
    assert choice.chosen == best.name
    assert best.perplexity < choice.fixed.perplexity < choice.base.perplexity
    alone = choose_gate(data, tokens(60, documents=1), {})
    assert alone is not None
    assert alone.measured()["negatives"][0]["standard_error"] is None, "one cluster says nothing of its error"
    for found in (choice, alone):
        # Tuples become lists; nothing else may change, and no NaN, which is no JSON.
        assert json.loads(json.dumps(found.measured(), allow_nan=False))["chosen"] == found.chosen


def test_negatives_count_for_more_where_they_would_be_harmed() -> None:
    """Tokens that gain so much where neighbours know them that the negatives' small loss hardly matters to the mean."""
    data, useless = tokens(800, 1, helpful=0.7, missing=0.0), tokens(800, 2, helpful=0.0, missing=0.0)
    data = replace(data, lm=data.lm - 6.0)
    # A hint whether they do, which is right more often than not.
    for part in (data, useless):
        hint = np.where(part.knn > -np.inf, 1.2, -1.2)
        part.features[:, 3] = torch.from_numpy(np.random.default_rng(5).normal(hint, 1.0))
    choice = choose_gate(data, None, {"other": useless})
    assert choice is not None
    assert choice.gate is not None
    assert choice.negative_share > NEGATIVE_SHARES[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_choice, "NEGATIVE_SHARES", NEGATIVE_SHARES[:1])
        least = choose_gate(data, None, {"other": useless})
    assert least is not None
    assert choice.negatives[0].change < least.negatives[0].change
    # Where the neighbours do no harm, the smallest share is enough.
    easy = choose_gate(data, None, {"other": tokens(800, 3, helpful=1.0, missing=0.0)})
    assert easy is not None
    assert easy.negative_share == NEGATIVE_SHARES[0]


def test_a_context_nearer_than_any_that_was_fitted_makes_no_token_impossible() -> None:
    data = tokens(2000)
    form = fit_epochs(lesson(data, None, []).examples(np.ones(len(data), bool)), (), 0.3, epochs=8)[-1]
    beyond = data.features.clone()
    beyond[:, NEAREST] = -100.0
    weights = Gate(form).weights(beyond).numpy()
    assert float(form(beyond).max()) == 1.0
    assert weights.max() < 1.0
    assert np.isfinite(data.log_probs(weights)).all()


def test_one_short_document_can_not_be_held_out() -> None:
    assert choose_gate(tokens(200, documents=1), None, {}) is None
    assert choose_gate(tokens(200, documents=1), None, {"other": tokens(200, seed=1, helpful=0.0)}) is None


@given(seed=st.integers(0, 100))
@settings(max_examples=20)
def test_a_floor_costs_nothing(seed: int) -> None:
    data = tokens(300, seed)
    taught = lesson(data, None, [])
    weights = np.random.default_rng(seed).uniform(0, 0.2, 300)
    floor = best_floor(taught, weights)
    floored = np.where(weights < floor, 0.0, weights)
    assert taught.loss(floored) <= taught.loss(weights) + 1e-5
    network = Network((0.0,) * len(FEATURES), (1.0,) * len(FEATURES), ((((0.3,) * len(FEATURES),), (0.0,)),))
    gated = Gate(network, floor).weights(data.features)
    assert bool(((gated == 0) | (gated >= floor)).all())


def test_skip_points_against_a_loop() -> None:
    random = np.random.default_rng(0)
    scores, gain = random.integers(0, 12, 80) / 10, random.normal(0.05, 0.2, 80)
    points = skip_points(scores, gain)
    assert len(points) == len(set(scores))
    for point in points:
        skipped = scores < point.threshold
        assert point.saved == pytest.approx(skipped.mean())
        assert math.log1p(point.change) == pytest.approx(sum(value for value, gone in zip(gain, skipped, strict=True) if gone) / 80)
    assert points[-1].saved == 1


def test_a_skip_rule_saves_what_gains_nothing() -> None:
    """Where the LM is sure, neighbours know nothing; the LM's features say so."""
    data = tokens(2000, 3)
    sure = np.random.default_rng(1).random(2000) < 0.4
    data.features[:, 0] = torch.from_numpy(np.where(sure, 0.1, 3.0))
    data.knn[sure] = -np.inf
    taught = lesson(data, None, [])
    weights = np.where(sure, 0.0, 0.3)
    found = fit_skip_rule(taught, weights)
    assert found.rule is not None
    assert found.chosen is not None
    assert found.chosen.saved > 0.35
    assert found.chosen.change <= MOST_LOSS
    assert (found.rule(data.lm_features).numpy() == sure).mean() > 0.95
    assert [point.saved for point in found.curve] == sorted(point.saved for point in found.curve)
    assert found.curve[-1].saved == 1


def test_no_rule_where_every_search_gains() -> None:
    data = tokens(600, helpful=1.0, missing=0.0)
    found = fit_skip_rule(lesson(data, None, []), np.full(600, 0.8))
    assert found.rule is None
    assert found.chosen is None
    assert not found.skipped.any()
