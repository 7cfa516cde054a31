"""Where searches are measured: seeded, allowed, and without what would make it easy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import Datastore
from knnlm.entry_mask import EntryMask
from knnlm.errors import CorpusError
from knnlm.model import HFLanguageModel
from knnlm.search_positions import Positions, sample_entries, stored_positions, text_positions
from knnlm.windows import Windowing
from tests.stores import build, gpt2, text_folder
from tests.tiny import tiny_corpus

__all__ = ["gpt2"]

ranges = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=4)


@given(st.integers(91, 130), ranges)
def test_a_mask_counts_its_allowed_entries_like_numpy(length: int, left_out: list[tuple[int, int]]) -> None:
    mask = EntryMask.without(length, left_out)
    kept = np.setdiff1d(np.arange(length), [i for start, stop in left_out for i in range(start, stop)])
    assert mask.at(np.arange(mask.allowed)).tolist() == kept.tolist()


@given(st.integers(91, 500), ranges, st.integers(0, 140), st.integers(0, 9))
def test_samples_are_allowed_ascending_distinct_and_always_the_same(
    length: int, left_out: list[tuple[int, int]], count: int, seed: int
) -> None:
    mask = EntryMask.without(length, left_out)
    sample = sample_entries(length, mask, count, seed)
    assert len(sample) == min(count, mask.allowed)
    assert (np.diff(sample) > 0).all()
    assert mask.allows(torch.from_numpy(sample)).all()
    assert np.array_equal(sample, sample_entries(length, mask, count, seed))
    assert len(sample_entries(length, None, count, seed)) == min(count, length)


def test_nothing_allowed_gives_no_sample() -> None:
    assert len(sample_entries(20, EntryMask.without(20, [(0, 20)]))) == 0


def test_every_entry_is_drawn_for_some_seed() -> None:
    mask = EntryMask.without(30, [(7, 12)])
    drawn = np.unique(np.concatenate([sample_entries(30, mask, 5, seed) for seed in range(60)]))
    assert drawn.tolist() == [*range(7), *range(12, 30)]


@pytest.fixture(scope="module")
def store(gpt2: HFLanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Datastore:
    folder = tmp_path_factory.mktemp("positions")
    build(text_folder(folder / "corpus", tiny_corpus(12)), folder / "store", gpt2, index="exact", keys="float32", max_length=16)
    return Datastore.open(folder / "store")


def stored(store: Datastore, entries: np.ndarray, windowing: Windowing, live: int) -> Positions:
    assert store.keys is not None
    rows = torch.from_numpy(entries)
    return stored_positions(entries, store.keys.gather(rows), store.values.gather(rows), store.documents, windowing, live)


def test_each_stored_entry_leaves_out_its_own_document(store: Datastore) -> None:
    entries = sample_entries(len(store), None, 40)
    positions = stored(store, entries, store.manifest.windowing, len(store))
    assert positions.source == "stored entries, own document left out"
    for entry, (first, last), value in zip(entries.tolist(), positions.left_out.tolist(), positions.values.tolist(), strict=True):
        document = store.documents.of_entry(entry)
        assert [e for e in range(len(store)) if store.documents.of_entry(e) == document] == list(range(first, last))
        assert value == int(store.values.slice(entry, entry + 1)[0])
    assert positions.queries.dtype == torch.float32


def test_of_a_document_that_is_most_of_the_store_only_the_neighbourhood_is_left_out(store: Datastore) -> None:
    starts, last = zip(*(store.documents.entry_range(d) for d in range(12)), strict=True)
    biggest = int(np.argmax(np.subtract(last, starts)))
    size = last[biggest] - starts[biggest]
    middle = (starts[biggest] + last[biggest]) // 2
    entries = np.array(sorted([starts[biggest], middle, last[biggest] - 1, 0 if biggest else len(store) - 1]))
    positions = stored(store, entries, Windowing(10, 5), 2 * size - 1)
    expected = {starts[biggest]: (starts[biggest], starts[biggest] + 11), middle: (middle - 10, middle + 11)}
    expected[last[biggest] - 1] = (last[biggest] - 11, last[biggest])
    for entry, left_out in zip(entries.tolist(), positions.left_out.tolist(), strict=True):
        assert tuple(left_out) == expected.get(entry, store.documents.entry_range(store.documents.of_entry(entry)))
    assert "in 3, whose document holds more than half of all, the 10 entries to either side" in positions.source
    assert "in 3" not in stored(store, entries, Windowing(10, 5), 2 * size).source


@pytest.mark.parametrize("count", [1, 7, 100, 100_000])
def test_queries_of_text_are_the_keys_that_building_stores_for_it(store: Datastore, gpt2: HFLanguageModel, count: int) -> None:
    """The store's own documents, read as held-out text, must give its own keys and values."""
    assert store.keys is not None
    documents = [
        store.tokens.slice(start, start + tokens).numpy()
        for start, tokens in zip(store.documents.token_starts.tolist(), store.documents.token_counts.tolist(), strict=True)
    ]
    positions = text_positions(gpt2, documents, store.manifest.windowing, count)
    assert len(positions) == len(positions.values) == min(count, len(store))
    assert (positions.left_out == 0).all()
    keys, values = store.keys.slice(0, len(store)), store.values.slice(0, len(store))
    nearest = torch.cdist(positions.queries.double(), keys.double()).topk(1, largest=False)
    assert float(nearest.values.max()) < 1e-4
    same = torch.cdist(positions.queries.double(), keys.double()) < 1e-4
    assert all((values[row] == value).any() for row, value in zip(same, positions.values, strict=True))
    again = text_positions(gpt2, documents, store.manifest.windowing, count)
    assert torch.equal(again.queries, positions.queries)


def test_few_windows_are_read_for_many_positions(store: Datastore, gpt2: HFLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    forward = gpt2.forward
    monkeypatch.setattr(gpt2, "forward", lambda tokens, **options: read.append(tokens.shape[1]) or forward(tokens, **options))
    tokens = [store.tokens.slice(0, store.manifest.counts.tokens).numpy()]
    assert len(text_positions(gpt2, tokens, store.manifest.windowing, 60)) == 60
    assert len(read) == 8


def test_text_without_a_position_is_refused(gpt2: HFLanguageModel) -> None:
    with pytest.raises(CorpusError, match="two tokens"):
        text_positions(gpt2, [np.array([3]), np.array([], dtype=np.int32)], Windowing(8, 4))
