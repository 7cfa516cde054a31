"""Several datastores in one mixture, against a slow one in NumPy, and what must hold whatever they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.datastore_mix import StoreMix, StoreShare, heaviest_first, retrieve_union
from knnlm.distribution import knn_log_probs, knn_token_log_probs, log_weights
from knnlm.entry_mask import EntryMask
from knnlm.errors import InvalidInput
from knnlm.gated import RowWeights
from knnlm.index import ExactIndex
from knnlm.knn_lm import mix_neighbors
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from tests import reference

DIMENSION, VOCABULARY = 6, 9
SEEDS = st.integers(0, 10_000)
TEMPERATURES = st.sampled_from([1e-300, 0.05, 1.0, 30.0, 1e300])


@dataclass(frozen=True)
class Store:
    """Keys and values in memory, and how they are searched."""

    keys: np.ndarray
    values: np.ndarray
    retriever: Retriever


def store(keys: np.ndarray, values: np.ndarray, removed: Sequence[tuple[int, int]] = ()) -> Store:
    rows = ShardedRows([keys], [0])
    mask = EntryMask.without(len(keys), removed) if removed else None
    return Store(keys, values, Retriever(ExactIndex(rows), rows, ShardedRows([values], [0]), allowed=lambda: mask))


def random_store(entries: int, seed: int) -> Store:
    chance = np.random.default_rng(seed)
    # Few places, so that keys are equal and distances tie, within a store and between stores.
    keys = chance.integers(-1, 2, (entries, DIMENSION)).astype(np.float32)
    return store(keys, chance.integers(0, VOCABULARY, entries).astype(np.int32))


def random_queries(rows: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed + 1).normal(size=(rows, DIMENSION)).astype(np.float32))


def random_lm(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def full(rows: int, value: float) -> torch.Tensor:
    return torch.full((rows,), value, dtype=torch.float64)


def expected_union(
    query: np.ndarray, stores: Sequence[Store], weights: Sequence[float], k: int, temperature: float
) -> list[tuple[float, int, int, int, float]]:
    """(share of p_kNN, store, entry, token, distance) of each neighbour, the heaviest first: one softmax over all of them."""
    found = []
    for number, (one, weight) in enumerate(zip(stores, weights, strict=True)):
        if weight > 0:
            distances, ids = reference.neighbors(query.astype(np.float64), one.keys.astype(np.float64), k)
            found += [(d, math.log(weight), number, int(i), int(one.values[i])) for d, i in zip(distances, ids, strict=True)]
    nearest = min(distance for distance, *_ in found)
    scores = np.array([(nearest - distance) / temperature + prior for distance, prior, *_ in found])
    shares = np.exp(scores - np.logaddexp.reduce(scores))
    return sorted(
        ((share, number, entry, token, d) for share, (d, _, number, entry, token) in zip(shares, found, strict=True)),
        key=lambda neighbour: (-neighbour[0], neighbour[1], neighbour[4], neighbour[2]),
    )


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[Store], list[list[float]], list[int], int]:
    """Stores, for each row the weight of each (0: not used), k for each row, and a seed."""
    seed = draw(SEEDS)
    stores = [random_store(draw(st.integers(1, 12)), seed + number) for number in range(draw(st.integers(1, 4)))]
    weight = st.sampled_from([0.0, 1e-300, 0.2, 1.0, 1.0, 7.5, 1e300])
    rows = draw(st.lists(st.lists(weight, min_size=len(stores), max_size=len(stores)), min_size=1, max_size=6))
    ks = [draw(st.sampled_from([0, 1, 3, 20])) for _ in rows]
    return stores, rows, ks, seed


def union_of(stores: Sequence[Store], rows: Sequence[Sequence[float]], ks: Sequence[int], queries: torch.Tensor) -> Neighbors:
    weights = torch.tensor(rows, dtype=torch.float64)
    shares = [StoreShare(number, one.retriever, weights[:, number]) for number, one in enumerate(stores)]
    return retrieve_union(queries, torch.tensor(ks), shares)


@given(mixes(), TEMPERATURES, st.sampled_from([0.25, 1.0]))
def test_equals_numpy_row_by_row(mix: tuple[list[Store], list[list[float]], list[int], int], temperature: float, weight: float) -> None:
    stores, rows, ks, seed = mix
    queries, lm = random_queries(len(rows), seed), random_lm(len(rows), seed)
    found = union_of(stores, rows, ks, queries)
    mixed = mix_neighbors(lm, found, temperature=full(len(rows), temperature), weights=RowWeights(full(len(rows), weight)))
    for row, (weights, k) in enumerate(zip(rows, ks, strict=True)):
        if k == 0 or not any(weights):
            assert torch.equal(mixed.log_probs[row], lm[row])
            assert mixed.weight[row] == 0
            continue
        expected = expected_union(queries[row].numpy(), stores, weights, k, temperature)
        knn = np.zeros(VOCABULARY)
        for share, _, _, token, _ in expected:
            knn[token] += share
        np.testing.assert_allclose(mixed.log_probs[row].exp().numpy(), np.exp(reference.mixture(lm[row].numpy(), knn, weight)), atol=2e-5)
        neighbors = mixed.neighbors.row(row)
        shares = log_weights(neighbors, temperature).exp()[0].numpy()
        np.testing.assert_allclose(shares, [share for share, *_ in expected], atol=2e-5)
        assert (np.diff(shares) <= 0).all()
        assert neighbors.stores is not None
        places = set(zip(neighbors.stores[0].tolist(), neighbors.ids[0].tolist(), strict=True))
        assert places == {(number, entry) for _, number, entry, *_ in expected}
        assert neighbors.tokens[0].tolist() == [
            int(stores[number].values[entry]) for number, entry in zip(neighbors.stores[0].tolist(), neighbors.ids[0].tolist(), strict=True)
        ]


@given(mixes(), TEMPERATURES)
def test_a_row_of_a_batch_is_bitwise_the_row_alone(mix: tuple[list[Store], list[list[float]], list[int], int], temperature: float) -> None:
    stores, rows, ks, seed = mix
    queries, lm = random_queries(len(rows), seed), random_lm(len(rows), seed)

    def mixed(chosen: slice) -> tuple[torch.Tensor, Neighbors]:
        found = union_of(stores, rows[chosen], ks[chosen], queries[chosen])
        count = len(rows[chosen])
        result = mix_neighbors(lm[chosen], found, temperature=full(count, temperature), weights=RowWeights(full(count, 0.4)))
        return result.log_probs, result.neighbors

    log_probs, neighbors = mixed(slice(None))
    for row in range(len(rows)):
        alone, its = mixed(slice(row, row + 1))
        torch.testing.assert_close(log_probs[row], alone[0], rtol=1e-12, atol=1e-12)
        one, other = neighbors.row(row), its.row(0)
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.distances, other.distances)
        if one.ids.numel():
            assert one.stores is not None
            assert other.stores is not None
            assert torch.equal(one.stores, other.stores)


@given(SEEDS, st.integers(1, 11), TEMPERATURES)
def test_two_halves_searched_exactly_are_the_whole(seed: int, cut: int, temperature: float) -> None:
    whole = random_store(12, seed)
    halves = [store(whole.keys[part], whole.values[part]) for part in (slice(0, cut), slice(cut, None))]
    queries = random_queries(3, seed)
    mix = heaviest_first(StoreMix([half.retriever for half in halves], [1.0, 1.0]).retrieve(queries, 12), temperature)
    alone = whole.retriever.retrieve(queries, 12)
    torch.testing.assert_close(knn_log_probs(mix, temperature, VOCABULARY), knn_log_probs(alone, temperature, VOCABULARY))
    assert mix.stores is not None
    assert torch.equal((mix.ids + cut * mix.stores).sort(1).values, alone.ids.sort(1).values)


@given(SEEDS, st.sampled_from([0.5, 30.0]))
def test_a_datastore_of_tiny_weight_changes_nothing(seed: int, temperature: float) -> None:
    one, other = random_store(12, seed), random_store(12, seed + 1)
    queries = random_queries(2, seed)
    mixed = heaviest_first(StoreMix([one.retriever, other.retriever], [1.0, 1e-200]).retrieve(queries, 5), temperature)
    alone = one.retriever.retrieve(queries, 5)
    tokens = torch.tensor([3, 4])
    assert torch.equal(knn_token_log_probs(mixed, temperature, tokens).exp(), knn_token_log_probs(alone, temperature, tokens).exp())
    assert torch.equal(mixed.ids[:, :5], alone.ids)


@given(mixes(), st.randoms(use_true_random=False), st.sampled_from([0.05, 30.0]))
def test_the_order_of_naming_makes_no_difference(
    mix: tuple[list[Store], list[list[float]], list[int], int], chance: object, temperature: float
) -> None:
    stores, rows, ks, seed = mix
    queries = random_queries(len(rows), seed)
    weights = torch.tensor(rows, dtype=torch.float64)
    shares = [StoreShare(number, one.retriever, weights[:, number]) for number, one in enumerate(stores)]
    straight = heaviest_first(retrieve_union(queries, torch.tensor(ks), shares), temperature)
    chance.shuffle(shares)  # type: ignore[attr-defined]
    shuffled = heaviest_first(retrieve_union(queries, torch.tensor(ks), shares), temperature)
    for one, other in zip(vars(straight).values(), vars(shuffled).values(), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@given(SEEDS, st.sampled_from([0.05, 30.0]))
def test_the_order_of_a_mix_makes_no_difference(seed: int, temperature: float) -> None:
    sources, weights = [random_store(7, seed + number).retriever for number in range(3)], [1.0, 0.3, 4.0]
    queries = random_queries(2, seed)
    straight = StoreMix(sources, weights).retrieve(queries, 4)
    turned = StoreMix(sources[::-1], weights[::-1]).retrieve(queries, 4)
    torch.testing.assert_close(knn_log_probs(straight, temperature, VOCABULARY), knn_log_probs(turned, temperature, VOCABULARY))


@settings(max_examples=20)
@given(SEEDS, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_only_the_ratio_of_weights_counts(seed: int, weight: float, factor: float) -> None:
    one, other = random_store(9, seed), random_store(9, seed + 1)
    queries = random_queries(2, seed)

    def knn(*weights: float) -> torch.Tensor:
        return knn_log_probs(StoreMix([one.retriever, other.retriever], weights).retrieve(queries, 4), 5.0, VOCABULARY)

    torch.testing.assert_close(knn(weight, 1.0), knn(weight * factor, factor), rtol=1e-5, atol=1e-5)


def test_a_weight_is_worth_its_logarithm_times_the_temperature() -> None:
    """Twice the weight is as good as being nearer by T·log 2."""
    key = np.zeros((1, DIMENSION), np.float32)
    near, far = (store(key + shift, np.array([token], np.int32)) for shift, token in ((0.0, 1), (1.0, 2)))
    found = StoreMix([near.retriever, far.retriever], [1.0, 2.0]).retrieve(torch.zeros(1, DIMENSION), 1)
    temperature = 4.0
    shares = log_weights(found, temperature)[0]
    assert (shares[0] - shares[1]).item() == pytest.approx(DIMENSION / temperature - math.log(2.0))
    assert heaviest_first(found, temperature).tokens.tolist() == [[1, 2]]
    assert heaviest_first(found, 100.0).tokens.tolist() == [[2, 1]]


def test_rows_that_use_no_datastore_are_not_searched() -> None:
    class Counting:
        def __init__(self, inner: Retriever) -> None:
            self.inner, self.rows = inner, 0

        def retrieve(self, queries: torch.Tensor, k: torch.Tensor | int) -> Neighbors:
            self.rows += int((torch.as_tensor(k) > 0).sum())
            return self.inner.retrieve(queries, k)

    sources = [Counting(random_store(5, seed).retriever) for seed in (1, 2, 3)]
    weights = torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.float64)
    shares = [StoreShare(number, source, weights[:, number]) for number, source in enumerate(sources)]
    found = retrieve_union(random_queries(4, 0), torch.tensor([2, 2, 2, 0]), shares)
    assert [source.rows for source in sources] == [2, 1, 0]
    assert found.found.sum(1).tolist() == [2, 0, 4, 0]
    assert found.ids.shape == (4, 4)


def test_removed_entries_are_missing_and_the_other_datastore_speaks() -> None:
    gone, left = random_store(4, 1), random_store(4, 2)
    empty = store(gone.keys, gone.values, removed=[(0, 4)])
    found = StoreMix([empty.retriever, left.retriever], [5.0, 1.0]).retrieve(random_queries(2, 0), 3)
    assert found.stores is not None
    assert found.stores.tolist() == [[1, 1, 1], [1, 1, 1]]
    nothing = StoreMix([empty.retriever, empty.retriever], [5.0, 1.0]).retrieve(random_queries(2, 0), 3)
    lm = random_lm(2, 0)
    assert torch.equal(mix_neighbors(lm, nothing, temperature=full(2, 1.0), weights=RowWeights(full(2, 0.5))).log_probs, lm)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_means_nothing_is_refused(weight: float) -> None:
    with pytest.raises(InvalidInput, match=r"weights\[1\]: is .* but must be above 0"):
        StoreMix([random_store(2, 0).retriever, random_store(2, 1).retriever], [1.0, weight])
