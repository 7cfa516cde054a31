"""Searches that leave entries out: the bitmap against NumPy, and neighbours against brute force over what is left."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.index import INDEX_FILE, ExactIndex, FaissIndex, IndexFacts, NeighborIndex
from knnlm.interpolation import effective_weight, interpolate_at
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.search_settings import SearchSettings
from tests import reference

DIMENSION, ENTRIES, CELLS = 8, 400, 10
EXACT_INDEXES = ("exact", "Flat", "IVF10,Flat", "PCA8,IVF10,Flat")
TAKES_NO_SELECTOR = ("SQ8", "HNSW16")
INDEXES = (*EXACT_INDEXES, *TAKES_NO_SELECTOR)

Ranges = list[tuple[int, int]]


@st.composite
def lengths_and_ranges(draw: st.DrawFn) -> tuple[int, Ranges]:
    length = draw(st.integers(0, 70))
    ends = st.tuples(st.integers(0, length), st.integers(0, length)).map(sorted).map(tuple)
    return length, draw(st.lists(ends, max_size=6))  # type: ignore[arg-type]


def kept_by(length: int, ranges: Ranges) -> np.ndarray:
    kept = np.ones(length, dtype=bool)
    for start, stop in ranges:
        kept[start:stop] = False
    return kept


@given(lengths_and_ranges())
def test_a_mask_is_what_numpy_says(given: tuple[int, Ranges]) -> None:
    length, ranges = given
    kept, mask = kept_by(length, ranges), EntryMask.without(length, ranges)
    assert mask.bits.tolist() == np.packbits(kept, bitorder="little").tolist()
    assert mask.allowed == kept.sum()
    assert mask.allows(torch.arange(length)).tolist() == kept.tolist()


@given(lengths_and_ranges(), st.data())
def test_a_range_less_leaves_the_mask_before_as_it_was(given: tuple[int, Ranges], data: st.DataObject) -> None:
    length, ranges = given
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    mask = EntryMask.without(length, ranges)
    before = mask.bits.copy()
    less = mask.without_range(start, stop)
    assert less.allows(torch.arange(length)).tolist() == kept_by(length, [*ranges, (start, stop)]).tolist()
    assert less.allowed == kept_by(length, [*ranges, (start, stop)]).sum()
    assert mask.bits.tolist() == before.tolist()


@given(lengths_and_ranges(), st.data())
def test_rows_are_a_slice_and_numbers_outside_are_not_allowed(given: tuple[int, Ranges], data: st.DataObject) -> None:
    length, ranges = given
    kept, mask = kept_by(length, ranges), EntryMask.without(length, ranges)
    start = data.draw(st.integers(0, length))
    stop = data.draw(st.integers(start, length))
    assert mask.rows(start, stop).tolist() == kept[start:stop].tolist()
    ids = data.draw(st.lists(st.integers(-3, length + 20), max_size=20))
    expected = [0 <= number < length and bool(kept[number]) for number in ids]
    assert mask.allows(torch.tensor(ids, dtype=torch.int64)).tolist() == expected


@functools.cache
def keys() -> np.ndarray:
    """Points around ten centres, in order of their centres: a range of entries lies together, as a document's do."""
    chance = np.random.default_rng(3)
    centres = 4 * chance.normal(size=(CELLS, DIMENSION))
    return (np.repeat(centres, ENTRIES // CELLS, axis=0) + chance.normal(size=(ENTRIES, DIMENSION))).astype(np.float32)


@functools.cache
def index_of(kind: str) -> NeighborIndex:
    if kind == "exact":
        return ExactIndex(ShardedRows([keys()], [0]), tile=150)
    made = faiss.index_factory(DIMENSION, kind)
    inverted = faiss.try_extract_index_ivf(made)
    if inverted is None:
        made = faiss.IndexIDMap2(made)
    made.train(keys())
    made.add_with_ids(keys(), np.arange(ENTRIES))
    facts = IndexFacts(kind, DIMENSION, ENTRIES, inverted.nlist if inverted is not None else 0, 0, 0, None)
    with TemporaryDirectory() as folder:
        path = Path(folder) / INDEX_FILE
        faiss.write_index(made, str(path))
        return FaissIndex(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), facts)


def retriever(kind: str, allowed: Callable[[], EntryMask | None], *, probes: int = CELLS, stored: bool = True) -> Retriever:
    index = index_of(kind)
    settings = SearchSettings.fixed(index.nlist, ENTRIES, probes, 2.0)
    values = ShardedRows([(np.arange(ENTRIES) % 50).astype(np.int32)], [0])
    return Retriever(index, ShardedRows([keys()], [0]) if stored else None, values, settings, allowed)


def queries(seed: int, count: int = 3) -> torch.Tensor:
    chance = np.random.default_rng(seed)
    near = keys()[chance.integers(0, ENTRIES, count)]
    return torch.from_numpy((near + 0.5 * chance.normal(size=near.shape)).astype(np.float32))


def assert_nearest_allowed(found: Neighbors, asked: torch.Tensor, kept: np.ndarray, k: int) -> None:
    numbers = np.flatnonzero(kept)
    for row, query in enumerate(asked.double().numpy()):
        distances, places = reference.neighbors(query, keys()[numbers].astype(np.float64), k)
        assert found.row(row).ids[0].tolist() == numbers[places].tolist()
        np.testing.assert_allclose(found.row(row).distances[0].numpy(), distances, rtol=1e-5, atol=1e-4)


some_ranges = st.lists(st.tuples(st.integers(0, ENTRIES), st.integers(0, 150)).map(lambda r: (r[0], min(sum(r), ENTRIES))), max_size=5)


@pytest.mark.parametrize("kind", EXACT_INDEXES)
@given(ranges=some_ranges, seed=st.integers(0, 1000), k=st.integers(1, 40))
def test_neighbours_are_the_nearest_of_those_that_are_left(kind: str, ranges: Ranges, seed: int, k: int) -> None:
    mask, asked = EntryMask.without(ENTRIES, ranges), queries(seed)
    found = retriever(kind, lambda: mask).retrieve(asked, k)
    assert_nearest_allowed(found, asked, kept_by(ENTRIES, ranges), k)


@pytest.mark.parametrize("stored", [True, False], ids=["keys", "no keys"])
@pytest.mark.parametrize("kind", INDEXES)
@given(ranges=some_ranges, seed=st.integers(0, 1000), k=st.integers(1, 40), probes=st.integers(1, 3))
def test_k_neighbours_are_found_as_long_as_there_are_as_many(
    kind: str, stored: bool, ranges: Ranges, seed: int, k: int, probes: int
) -> None:
    """With few cells probed, all of which may have lost everything, and distances from the index."""
    mask, kept, asked = EntryMask.without(ENTRIES, ranges), kept_by(ENTRIES, ranges), queries(seed)
    found = retriever(kind, lambda: mask, probes=probes, stored=stored).retrieve(asked, k)
    # The graph of HNSW has no way to some entries, whatever is left out.
    reached = mask.allows(index_of(kind).search(asked, ENTRIES, ENTRIES, probes=CELLS).ids).sum(1)
    assert kind == "HNSW16" or reached.tolist() == [kept.sum()] * 3
    assert found.found.sum(1).tolist() == reached.clamp(max=k).tolist()
    assert kept[found.ids[found.found].numpy()].all()


@pytest.mark.parametrize("kind", [*EXACT_INDEXES, "SQ8"])
@given(ranges=some_ranges, seed=st.integers(0, 1000), ks=st.lists(st.sampled_from([0, 3, 30]), min_size=2, max_size=5))
def test_rows_with_entries_left_out_are_each_alone(kind: str, ranges: Ranges, seed: int, ks: list[int]) -> None:
    mask, asked = EntryMask.without(ENTRIES, ranges), queries(seed, len(ks))
    searching = retriever(kind, lambda: mask, probes=1)
    batch = searching.retrieve(asked, torch.tensor(ks))
    for row, k in enumerate(ks):
        alone = searching.retrieve(asked[row : row + 1], k)
        assert batch.row(row).ids.tolist() == alone.row(0).ids.tolist()
        assert torch.equal(batch.row(row).distances, alone.row(0).distances)


@pytest.mark.parametrize("kind", INDEXES)
def test_with_nothing_left_the_base_lm_speaks_alone(kind: str) -> None:
    mask = EntryMask.without(ENTRIES, [(0, ENTRIES)])
    found = retriever(kind, lambda: mask).retrieve(queries(0), 5)
    assert found.ids.tolist() == [[-1] * 5] * 3
    lm = torch.randn(3, 60).log_softmax(-1)
    weight = effective_weight(torch.full((3,), 0.5, dtype=torch.float64), found.found)
    assert torch.equal(interpolate_at(lm, found.tokens, torch.full((3, 5), -torch.inf), weight), lm)


def test_what_is_allowed_is_asked_at_each_search() -> None:
    asked = queries(5)
    masks: list[EntryMask | None] = [None]
    searching = retriever("IVF10,Flat", lambda: masks[-1])
    before = searching.retrieve(asked, 4)
    gone = int(before.ids[0, 0])
    masks.append(EntryMask.without(ENTRIES, [(gone, gone + 1)]))
    after = searching.retrieve(asked, 4)
    assert after.ids[0, :3].tolist() == before.ids[0, 1:].tolist()
    assert gone not in after.ids
