"""Token sequences of a text that stand in a datastore, against sets of tuples."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.evaluation import overlap
from knnlm.evaluation.overlap import Layout, Matches, find_sequences, sequence_hashes

Document = list[int]
DOCUMENTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=5)
LENGTH = st.integers(1, 15)


def stored(documents: list[Document], shard: int = 1000) -> tuple[ShardedRows, Layout]:
    """Documents as the stream of a store whose shards hold ``shard`` tokens."""
    stream = np.concatenate([np.zeros(0, np.int32), *(np.array(document, np.int32) for document in documents)])
    counts = np.array([len(document) for document in documents], np.int64)
    starts = list(range(0, max(len(stream), 1), shard))
    return ShardedRows([stream[start : start + shard] for start in starts], starts), Layout(np.cumsum(counts) - counts, counts)


def sequences(document: Document, length: int) -> list[tuple[int, ...]]:
    return [tuple(document[start : start + length]) for start in range(len(document) - length + 1)]


def find(text: list[Document], documents: list[Document], length: int, *, shard: int = 1000, chunk: int = 1 << 20) -> Matches:
    rows, layout = stored(documents, shard)
    with patch.object(overlap, "CHUNK", chunk):
        return find_sequences([np.array(d, np.int32) for d in text], rows, layout, [(0, len(rows))], length)


@given(DOCUMENTS, DOCUMENTS, LENGTH, st.integers(1, 30), st.integers(1, 40))
def test_it_equals_sets_of_tuples(text: list[Document], documents: list[Document], length: int, shard: int, chunk: int) -> None:
    check(text, documents, length, shard, chunk)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=40), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40), st.integers(1, 20), st.booleans()), min_size=1, max_size=5),
    LENGTH,
    st.integers(1, 30),
    st.integers(1, 40),
)
def test_pieces_of_the_store_are_found_wherever_they_lie(
    documents: list[Document], pieces: list[tuple[int, int, int, bool]], length: int, shard: int, chunk: int
) -> None:
    """Also from one shard, or piece that is read, into the next."""
    text = [documents[number % len(documents)][start : start + size] + [99] * other for number, start, size, other in pieces]
    check(text, documents, length, shard, chunk)


def check(text: list[Document], documents: list[Document], length: int, shard: int, chunk: int) -> None:
    known = {sequence for document in documents for sequence in sequences(document, length)}
    asked = {sequence for document in text for sequence in sequences(document, length)}
    found = find(text, documents, length, shard=shard, chunk=chunk)
    flags, covered = [], []
    for document in text:
        matching = [start for start, sequence in enumerate(sequences(document, length)) if sequence in known]
        flags += [place in matching for place in range(len(document))]
        covered += [any(start <= place < start + length for start in matching) for place in range(len(document))]
    assert found.found.tolist() == flags
    assert found.covered().tolist() == covered
    assert found.sequences == sum(len(sequences(document, length)) for document in text)
    assert found.in_documents.tolist() == [sum(s in asked for s in sequences(document, length)) for document in documents]


@given(st.lists(st.integers(0, 2**31 - 1), min_size=13, max_size=40), st.integers(0, 12), st.integers(0, 30))
def test_one_other_token_is_another_sequence(tokens: Document, place: int, bit: int) -> None:
    other = list(tokens[:13])
    other[place] ^= 1 << bit
    assert find([tokens[:13]], [tokens], 13).found[0]
    assert find([other], [tokens], 13).found[0] == (tuple(other) in sequences(tokens, 13))


def test_no_two_of_a_million_sequences_share_a_hash() -> None:
    """Of few distinct tokens, as language has them; equal sequences have equal hashes, wherever they stand."""
    tokens = np.random.default_rng(0).zipf(1.3, 400_000).clip(max=50_000).astype(np.int32)
    for length in (2, 8, 13):
        windows = np.lib.stride_tricks.sliding_window_view(tokens, length)
        hashes = sequence_hashes(tokens, length)
        assert len(hashes) == len(windows)
        assert len(np.unique(hashes)) == len(np.unique(windows, axis=0))


def test_the_order_of_tokens_counts() -> None:
    tokens = list(range(13))
    assert not find([tokens[::-1]], [tokens], 13).found.any()


def test_a_sequence_that_runs_into_the_next_document_stands_nowhere() -> None:
    tokens = list(range(20))
    assert find([tokens], [tokens], 13).found.sum() == 8
    assert not find([tokens], [tokens[:10], tokens[10:]], 13).found.any()


@pytest.mark.parametrize("text", [[], [[]], [[1] * 12]])
def test_text_without_any_sequence_has_no_overlap(text: list[Document]) -> None:
    found = find(text, [[1] * 50], 13)
    assert found.sequences == 0
    assert not found.found.any()
    assert found.in_documents.tolist() == [0]


def test_ranges_that_are_not_looked_at_hold_nothing() -> None:
    documents = [list(range(20)), list(range(20, 40)), list(range(40, 60))]
    rows, layout = stored(documents, 35)
    text = [np.array(document, np.int32) for document in documents]
    for ranges, kept in (([(0, 60)], [1, 1, 1]), ([(0, 20), (40, 60)], [1, 0, 1]), ([], [0, 0, 0])):
        found = find_sequences(text, rows, layout, ranges, 13)
        assert found.found.sum() == 8 * sum(kept)
        assert found.in_documents.tolist() == [8 * each for each in kept]
