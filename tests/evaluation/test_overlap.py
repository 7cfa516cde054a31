"""The share of 13-token sequences that stand in the store, against a search of every sequence."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.evaluation import overlap
from knnlm.evaluation.overlap import NGRAM, ngram_overlap

TOKENS = st.lists(st.integers(0, 1), max_size=60)


def rows(shards: list[list[int]]) -> ShardedRows:
    starts = np.cumsum([0, *map(len, shards)])[: len(shards)]
    return ShardedRows([np.array(shard, np.int32) for shard in shards], starts.tolist())


def sequences(tokens: list[int]) -> list[tuple[int, ...]]:
    return [tuple(tokens[start : start + NGRAM]) for start in range(len(tokens) - NGRAM + 1)]


@given(st.lists(TOKENS, max_size=4), st.lists(TOKENS.filter(len), min_size=1, max_size=4), st.integers(1, 40))
def test_it_equals_brute_force(documents: list[list[int]], shards: list[list[int]], chunk: int) -> None:
    check(documents, shards, chunk)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=40), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 100), st.integers(NGRAM, 40), st.booleans()), max_size=5),
    st.integers(1, 40),
)
def test_pieces_of_the_store_are_found_wherever_they_lie(shards: list[list[int]], pieces: list[tuple[int, int, bool]], chunk: int) -> None:
    """Also from one shard, or piece that is read, into the next."""
    stream = [token for shard in shards for token in shard]
    check([stream[start : start + length] + [99] * other for start, length, other in pieces], shards, chunk)


def check(documents: list[list[int]], shards: list[list[int]], chunk: int) -> None:
    stored = set(sequences([token for shard in shards for token in shard]))
    wanted = [found for document in documents for found in sequences(document)]
    expected = sum(found in stored for found in wanted) / len(wanted) if wanted else 0.0
    with patch.object(overlap, "CHUNK", chunk):
        assert ngram_overlap([np.array(d, np.int32) for d in documents], rows(shards)) == pytest.approx(expected)


@given(st.lists(st.integers(0, 2**31 - 1), min_size=NGRAM, max_size=40), st.integers(0, 12), st.integers(0, 30))
def test_one_other_token_is_another_sequence(tokens: list[int], place: int, bit: int) -> None:
    other = list(tokens[:NGRAM])
    other[place] ^= 1 << bit
    assert ngram_overlap([np.array(tokens[:NGRAM], np.int32)], rows([tokens])) == 1
    expected = float(tuple(other) in sequences(tokens))
    assert ngram_overlap([np.array(other, np.int32)], rows([tokens])) == expected


def test_the_order_of_tokens_counts() -> None:
    tokens = list(range(NGRAM))
    assert ngram_overlap([np.array(tokens[::-1], np.int32)], rows([tokens])) == 0


@pytest.mark.parametrize("documents", [[], [[]], [[1] * (NGRAM - 1)]])
def test_text_without_any_sequence_has_no_overlap(documents: list[list[int]]) -> None:
    assert ngram_overlap([np.array(d, np.int32) for d in documents], rows([[1] * 50])) == 0


def test_ranges_that_are_not_looked_at_hold_nothing() -> None:
    tokens = list(range(60))
    asked = [np.array(tokens[start : start + NGRAM], np.int32) for start in (0, 20, 40)]
    stored = rows([tokens[:35], tokens[35:]])
    assert ngram_overlap(asked, stored, [(0, 60)]) == 1
    assert ngram_overlap(asked, stored, [(0, 25), (33, 60)]) == pytest.approx(2 / 3)
    assert ngram_overlap(asked, stored, []) == 0
