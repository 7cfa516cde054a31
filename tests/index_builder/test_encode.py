"""Shards and their windows: every entry exactly once, whatever the shard size; keys and values where they belong."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.datastore.documents import DocumentRecord, DocumentTable, DocumentWriter
from knnlm.datastore.reader import Datastore
from knnlm.model import HFLanguageModel, find_last_feed_forward
from knnlm.windows import Windowing
from knnlm_index_builder.encode import plan_shards, shard_windows
from tests import reference
from tests.stores import build, token_folder
from tests.tiny import VOCABULARY, tiny_gpt2

LENGTHS = st.lists(st.integers(1, 60) | st.just(1), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 1)
WINDOWINGS = st.integers(2, 20).flatmap(lambda m: st.builds(Windowing, st.just(m), st.integers(1, m)))
SHARD_TOKENS = st.integers(1, 200)


def document_table(lengths: list[int]) -> DocumentTable:
    with tempfile.TemporaryDirectory() as folder:
        writer = DocumentWriter(Path(folder) / "documents.arrow")
        start = 0
        for number, length in enumerate(lengths):
            writer.add(DocumentRecord(str(number), "", start, length, 0, [], {}, number))
            start += length
        writer.close()
        return DocumentTable([Path(folder) / "documents.arrow"])


@given(LENGTHS, WINDOWINGS, SHARD_TOKENS)
def test_shards_cover_tokens_and_entries_exactly_once(lengths: list[int], windowing: Windowing, shard_tokens: int) -> None:
    shards = plan_shards(document_table(lengths), windowing, shard_tokens)
    assert [s.name for s in shards] == [f"{number:05d}" for number in range(len(shards))]
    assert [t for s in shards for t in range(s.token_start, s.token_start + s.tokens)] == list(range(sum(lengths)))
    assert [e for s in shards for e in range(s.entry_start, s.entry_start + s.entries)] == list(range(sum(lengths) - len(lengths)))
    assert min(s.entries for s in shards) >= 1


@given(LENGTHS, WINDOWINGS, SHARD_TOKENS)
def test_shards_are_no_larger_than_asked_but_for_one_block(lengths: list[int], windowing: Windowing, shard_tokens: int) -> None:
    single = sum(1 for length in lengths if length == 1)
    for shard in plan_shards(document_table(lengths), windowing, shard_tokens):
        # Documents of one token have no entry, so they can't end a shard alone.
        assert shard.tokens <= max(shard_tokens, windowing.stride) + 2 * single + 1


@given(LENGTHS, WINDOWINGS, SHARD_TOKENS)
def test_every_entry_is_in_exactly_one_window_of_its_shard(lengths: list[int], windowing: Windowing, shard_tokens: int) -> None:
    documents = document_table(lengths)
    starts = np.cumsum([0, *lengths])
    positions = [p for start, length in zip(starts, lengths, strict=False) for p in range(start + 1, start + length)]
    seen: list[int] = []
    for shard in plan_shards(documents, windowing, shard_tokens):
        for item in shard_windows(shard, documents, windowing):
            assert item.row >= 0
            assert item.row + item.window.target_count <= shard.entries
            for offset in range(item.window.target_count):
                entry, position = shard.entry_start + item.row + offset, item.origin + item.window.first_target + offset
                assert positions[entry] == position
                assert shard.token_start <= position < shard.token_start + shard.tokens
                seen.append(entry)
    assert sorted(seen) == list(range(len(positions)))


@given(LENGTHS, WINDOWINGS, SHARD_TOKENS)
def test_the_windows_of_a_document_do_not_depend_on_the_shard_size(lengths: list[int], windowing: Windowing, shard_tokens: int) -> None:
    documents = document_table(lengths)

    def all_windows(tokens: int) -> list[tuple[int, int, int, int]]:
        found = [item for s in plan_shards(documents, windowing, tokens) for item in shard_windows(s, documents, windowing)]
        return [(item.origin, item.window.start, item.window.first_target, item.window.end) for item in found]

    assert all_windows(shard_tokens) == all_windows(10_000)


DOCUMENTS = st.lists(
    st.integers(1, 20).flatmap(lambda n: st.lists(st.integers(0, VOCABULARY - 1), min_size=n, max_size=n))
    | st.lists(st.just(7), min_size=1, max_size=1),
    min_size=1,
    max_size=5,
).filter(lambda documents: max(map(len, documents)) > 1)


@settings(max_examples=8)
@given(DOCUMENTS, st.sampled_from([Windowing(6, 3), Windowing(5, 5), Windowing(4, 1), Windowing(64, 32)]), st.integers(1, 60))
def test_stores_round_trip_at_any_shard_size(
    gpt2: HFLanguageModel, documents: list[list[int]], windowing: Windowing, shard_tokens: int
) -> None:
    """Keys are those of an independent forward pass for each token; values the tokens after them."""
    hf = tiny_gpt2()
    expected = reference.score(hf, find_last_feed_forward(hf), documents, windowing.max_length, windowing.stride)
    with tempfile.TemporaryDirectory() as folder:
        corpus = token_folder(Path(folder) / "corpus", documents)
        options: dict[str, Any] = {"max_length": windowing.max_length, "stride": windowing.stride, "keys": "float32", "index": "exact"}
        build(corpus, Path(folder) / "store", gpt2, shard_tokens=shard_tokens, **options)
        store = Datastore.open(Path(folder) / "store", verify=True)
        keys, values = store.keys.slice(0, len(store)).numpy(), store.values.slice(0, len(store)).numpy()
        tokens = store.tokens.slice(0, len(store.tokens)).numpy()
        owners = [store.evidence(entry).document.id for entry in range(len(store))]
    np.testing.assert_allclose(keys, expected.keys, rtol=0, atol=1e-5 * np.abs(expected.keys).max())
    assert np.array_equal(values, expected.values)
    assert np.array_equal(tokens, np.concatenate(documents))
    assert owners == [f"{number:04}.npy" for number, document in enumerate(documents) for _ in document[1:]]


def test_a_shard_of_one_token_still_holds_a_block() -> None:
    shards = plan_shards(document_table([1, 9, 1, 1]), Windowing(4, 2), 1)
    assert [(s.tokens, s.entries) for s in shards] == [(3, 1), (2, 2), (2, 2), (2, 2), (3, 1)]


@pytest.mark.parametrize("lengths", [[100], [1, 99], [50, 50], [1] * 50 + [50]])
def test_one_shard_where_all_fits(lengths: list[int]) -> None:
    assert len(plan_shards(document_table(lengths), Windowing(8, 4), 100)) == 1
