"""Retrieval: exact distances, ties by entry id, and rows that no other row of the batch changes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.errors import InvalidInput
from knnlm.index import Candidates, ExactIndex
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.search_settings import SearchSettings
from tests import reference

DIMENSION = 8


def random_keys(entries: int, seed: int = 0, dtype: str = "float32", dimension: int = DIMENSION) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(entries, dimension)).astype(dtype)


def sharded(rows: np.ndarray, sizes: Sequence[int] | None = None) -> ShardedRows:
    """The rows cut into shards of these sizes (default: one shard)."""
    ends = np.cumsum(sizes or [len(rows)])
    assert ends[-1] == len(rows)
    starts = [0, *ends[:-1].tolist()]
    return ShardedRows([rows[a:b].copy() for a, b in zip(starts, ends, strict=True)], starts)


def exact_retriever(keys: np.ndarray, sizes: Sequence[int] | None = None, tile: int = 32_768) -> Retriever:
    values = (np.arange(len(keys)) % 50).astype(np.int32)
    rows = sharded(keys, sizes)
    return Retriever(ExactIndex(rows, tile=tile), rows, sharded(values, sizes))


def queries_of(keys: np.ndarray, count: int, seed: int = 1) -> torch.Tensor:
    """Some keys themselves, and points near none of them."""
    chance = np.random.default_rng(seed)
    near = keys[chance.integers(0, len(keys), count)].astype(np.float32)
    return torch.from_numpy(
        np.where(chance.random((count, 1)) < 0.5, near, near + chance.normal(size=near.shape).astype(np.float32)).astype(np.float32)
    )


def assert_same_bits(one: Neighbors, other: Neighbors) -> None:
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.distances.view(torch.int32), other.distances.view(torch.int32))


@given(st.integers(0, 1000), st.lists(st.sampled_from([0, 1, 2, 5, 17, 90]), min_size=1, max_size=9))
def test_a_row_of_a_batch_is_bitwise_the_row_alone_whatever_the_others_ask(seed: int, ks: list[int]) -> None:
    keys = random_keys(60, seed)
    retriever = exact_retriever(keys)
    queries = queries_of(keys, len(ks), seed)
    batch = retriever.retrieve(queries, torch.tensor(ks))
    assert batch.ids.shape == (len(ks), max(ks))
    for index, k in enumerate(ks):
        alone = retriever.retrieve(queries[index : index + 1], k)
        assert_same_bits(batch.row(index), alone.row(0))
        assert int(batch.found[index].sum()) == min(k, len(keys))


@given(st.integers(0, 1000), st.permutations(range(6)))
def test_order_of_rows_makes_no_difference(seed: int, order: list[int]) -> None:
    keys = random_keys(40, seed)
    retriever, queries, ks = exact_retriever(keys), queries_of(keys, 6, seed), torch.tensor([1, 7, 7, 0, 3, 60])
    straight, shuffled = retriever.retrieve(queries, ks), retriever.retrieve(queries[list(order)], ks[list(order)])
    for place, index in enumerate(order):
        assert_same_bits(shuffled.row(place), straight.row(index))


@settings(max_examples=30)
@given(st.integers(0, 1000), st.sampled_from(["float32", "float16"]), st.integers(1, 60))
def test_distances_and_ids_equal_numpy(seed: int, dtype: str, k: int) -> None:
    keys = random_keys(50, seed, dtype)
    queries = queries_of(keys, 5, seed)
    found = exact_retriever(keys).retrieve(queries, k)
    assert found.distances.dtype == torch.float32
    for index, query in enumerate(queries.double().numpy()):
        distances, ids = reference.neighbors(query, keys.astype(np.float64), k)
        assert found.row(index).ids[0].tolist() == ids.tolist()
        np.testing.assert_allclose(found.row(index).distances[0].numpy(), distances, rtol=1e-5, atol=1e-6)
        assert found.row(index).tokens[0].tolist() == (ids % 50).tolist()


def test_distances_are_computed_in_float32_from_float16_keys() -> None:
    keys = np.full((4, DIMENSION), 200, dtype=np.float16)
    keys[1:] = np.array([[199.875], [-200], [4200]])
    found = exact_retriever(keys).retrieve(torch.full((1, DIMENSION), 200.0), 4)
    assert found.distances[0].tolist() == [0, DIMENSION * 0.125**2, DIMENSION * 400.0**2, DIMENSION * 4000.0**2]
    assert found.ids[0].tolist() == [0, 1, 2, 3]


def test_ties_go_to_the_smaller_id_even_with_more_equals_than_candidates() -> None:
    keys = np.repeat(random_keys(3, seed=4), 40, axis=0)
    found = exact_retriever(keys).retrieve(torch.from_numpy(keys[[0, 40, 80]]), 5)
    assert found.ids.tolist() == [[0, 1, 2, 3, 4], [40, 41, 42, 43, 44], [80, 81, 82, 83, 84]]
    assert found.distances.tolist() == [[0] * 5] * 3


def test_ties_do_not_depend_on_the_batch() -> None:
    keys = np.repeat(random_keys(7, seed=4, dimension=33), 40, axis=0)
    retriever, queries = exact_retriever(keys), queries_of(keys, 200)
    batch = retriever.retrieve(queries, 6)
    for index in range(0, 200, 17):
        assert_same_bits(batch.row(index), retriever.retrieve(queries[index : index + 1], 6))


def test_one_number_for_all_rows_is_the_same_as_one_per_row() -> None:
    keys = random_keys(30)
    retriever, queries = exact_retriever(keys), queries_of(keys, 4)
    assert_same_bits(retriever.retrieve(queries, 3), retriever.retrieve(queries, torch.full((4,), 3)))


def test_rows_with_k_0_find_nothing_and_are_not_searched() -> None:
    keys = random_keys(30)
    rows = sharded(keys)
    searched: list[int] = []

    class Counting(ExactIndex):
        def search(self, queries: torch.Tensor, k: int, count: int, *, probes: int = 0, allowed: EntryMask | None = None) -> Candidates:
            searched.append(len(queries))
            return super().search(queries, k, count, probes=probes, allowed=allowed)

    retriever = Retriever(Counting(rows), rows, sharded(np.arange(30, dtype=np.int32)))
    found = retriever.retrieve(queries_of(keys, 3), torch.tensor([0, 4, 0]))
    assert searched == [1]
    assert found.found.any(dim=1).tolist() == [False, True, False]
    assert found.distances[0].tolist() == [math.inf] * 4
    assert retriever.retrieve(queries_of(keys, 3), torch.tensor([0, 0, 0])).ids.shape == (3, 0)
    assert retriever.retrieve(torch.zeros((0, DIMENSION)), torch.zeros(0, dtype=torch.int64)).ids.shape == (0, 0)
    assert searched == [1]


def test_fewer_entries_than_k_are_filled_up_and_masked() -> None:
    found = exact_retriever(random_keys(3)).retrieve(torch.zeros((2, DIMENSION)), 5)
    assert found.ids[:, 3:].tolist() == [[-1, -1]] * 2
    assert found.tokens[:, 3:].tolist() == [[0, 0]] * 2
    assert found.distances[:, 3:].tolist() == [[math.inf] * 2] * 2
    assert sorted(found.ids[0, :3].tolist()) == [0, 1, 2]


def test_candidates_of_the_index_are_measured_again_and_cut_by_exact_distance() -> None:
    keys = np.arange(10, dtype=np.float32)[:, None].repeat(DIMENSION, axis=1)
    rows = sharded(keys)

    class Wrong(ExactIndex):
        """Says that far entries are near, and finds none at some places."""

        def search(self, queries: torch.Tensor, k: int, count: int, *, probes: int = 0, allowed: EntryMask | None = None) -> Candidates:
            assert (k, count) == (3, 5)
            return Candidates(torch.zeros(1, count), torch.tensor([[7, -1, 2, 9, 4]]))

    retriever = Retriever(Wrong(rows), rows, sharded(np.arange(10, dtype=np.int32) * 10), SearchSettings.fixed(0, 10, 0, 1.5))
    found = retriever.retrieve(torch.full((1, DIMENSION), 4.0), 3)
    assert found.ids.tolist() == [[4, 2, 7]]
    assert found.tokens.tolist() == [[40, 20, 70]]
    assert found.distances.tolist() == [[0, 4 * DIMENSION, 9 * DIMENSION]]


@given(st.lists(st.integers(1, 17), min_size=1, max_size=5), st.integers(1, 20), st.integers(1, 30))
def test_shards_of_any_size_give_what_one_shard_gives(sizes: list[int], tile: int, k: int) -> None:
    keys = random_keys(sum(sizes), seed=sum(sizes))
    queries = queries_of(keys, 3)
    assert_same_bits(exact_retriever(keys, sizes, tile).retrieve(queries, k), exact_retriever(keys).retrieve(queries, k))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.data())
def test_sharded_rows_gather_slice_and_chunk_like_one_array(sizes: list[int], data: st.DataObject) -> None:
    whole = random_keys(sum(sizes), dtype="float16")
    rows = sharded(whole, sizes)
    assert len(rows) == len(whole)
    numbers = data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=12))
    assert np.array_equal(rows.gather(torch.tensor(numbers, dtype=torch.int64)).numpy(), whole[numbers])
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, len(whole)))
    assert np.array_equal(rows.slice(start, stop).numpy(), whole[start:stop])
    most = data.draw(st.integers(1, 12))
    pieces = list(rows.chunks(most))
    assert all(1 <= len(piece) <= most for _, piece in pieces)
    assert [first for first, _ in pieces] == np.cumsum([0, *(len(piece) for _, piece in pieces[:-1])]).tolist()
    assert np.array_equal(np.concatenate([piece.numpy() for _, piece in pieces]), whole)


def test_large_batches_are_re_ranked_in_pieces_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = random_keys(40)
    retriever, queries = exact_retriever(keys), queries_of(keys, 9)
    whole = retriever.retrieve(queries, 4)
    monkeypatch.setattr("knnlm.retrieval.RERANK_FLOATS", 2 * 8 * DIMENSION)
    assert_same_bits(retriever.retrieve(queries, 4), whole)


def test_negative_k_is_refused() -> None:
    with pytest.raises(InvalidInput, match="-2") as refused:
        exact_retriever(random_keys(5)).retrieve(torch.zeros((2, DIMENSION)), torch.tensor([1, -2]))
    assert refused.value.field == "k"


@pytest.mark.parametrize("overfetch", [0.5, 0.0, math.inf, math.nan])
def test_overfetch_below_1_is_refused(overfetch: float) -> None:
    with pytest.raises(InvalidInput) as refused:
        SearchSettings.fixed(0, 5, 0, overfetch)
    assert refused.value.field == "overfetch"
