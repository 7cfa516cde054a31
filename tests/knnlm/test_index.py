"""Indexes: whatever finds the candidates, retrieval gives what exact search gives; and what is refused, in words."""

from __future__ import annotations

import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.reader import ShardedRows
from knnlm.entry_mask import EntryMask
from knnlm.errors import IndexingError, MissingDependency, StoreDamaged
from knnlm.index import (
    EXACT,
    INDEX_FILE,
    INDEX_METADATA,
    ExactIndex,
    FaissIndex,
    NeighborIndex,
    open_index,
    read_index_facts,
    write_index_facts,
)
from knnlm.inverted_lists import lists_head
from knnlm.retrieval import Retriever
from knnlm.search_settings import SearchSettings
from knnlm_index_builder.merge_index import merge_parts
from knnlm_index_builder.train_index import train
from tests import reference
from tests.indexes import DIMENSION, ENTRIES, built, clustered, rows_of

# With 12 cells every search looks into all of them (never fewer than 16), so only the codes are inexact.
APPROXIMATE = ["IVF12,Flat", "IVF12,SQ8", "IVF12,PQ16x8np", "IVF12,RaBitQ", "PCAR8,IVF12,SQ8", "OPQ8_16,IVF12,PQ8x8np", "SQ8", "HNSW16"]


def queries(count: int, seed: int = 5, dimension: int = DIMENSION) -> torch.Tensor:
    keys = clustered(ENTRIES, dimension)[:count]
    return torch.from_numpy(keys + 0.3 * np.random.default_rng(seed).normal(size=keys.shape).astype(np.float32))


def retriever(index: NeighborIndex, keys: ShardedRows, overfetch: float = 2.0) -> Retriever:
    values = ShardedRows([np.arange(len(keys), dtype=np.int32)], [0])
    rule = SearchSettings(index.nlist, len(keys))
    settings = replace(rule, measured=tuple(replace(rule.for_k(k), overfetch=overfetch) for k in (1, 4, 16, 64)))
    return Retriever(index, keys, values, settings)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_flat_gives_what_exact_search_and_numpy_give(tmp_path: Path, count: int) -> None:
    keys = clustered()
    rows = rows_of(keys)
    asked = torch.cat([queries(count), torch.from_numpy(keys[:10])])
    flat = retriever(FaissIndex.open(built(rows, "Flat", tmp_path)), rows).retrieve(asked, 9)
    exact = retriever(ExactIndex(rows, tile=100), rows).retrieve(asked, 9)
    assert torch.equal(flat.ids, exact.ids)
    assert torch.equal(flat.distances, exact.distances)
    assert torch.equal(flat.tokens, exact.tokens)
    for index, query in enumerate(asked.double().numpy()):
        assert exact.ids[index].tolist() == reference.neighbors(query, keys.astype(np.float64), 9)[1].tolist()


@pytest.mark.parametrize("dimension", [16, 31, 64])
@pytest.mark.parametrize("kind", ["Flat", EXACT])
def test_ties_go_to_the_smaller_id_in_batches_of_any_size(tmp_path: Path, kind: str, dimension: int) -> None:
    """Contexts that many documents begin with give equal keys, more of them than there are candidates."""
    chance = np.random.default_rng(0)
    base = chance.normal(size=(10, dimension)).astype(np.float32)
    keys = np.concatenate([np.repeat(base, 120, axis=0), chance.normal(size=(300, dimension)).astype(np.float32)])
    keys = keys[chance.permutation(len(keys))]
    rows = rows_of(keys)
    index = open_index(built(rows, kind, tmp_path, dimension), rows, len(rows))
    asked = torch.from_numpy(np.concatenate([base] * 60))
    batch = retriever(index, rows).retrieve(asked, 8)
    for number in range(10):
        expected = reference.neighbors(base[number].astype(np.float64), keys.astype(np.float64), 8)[1].tolist()
        assert retriever(index, rows).retrieve(asked[number : number + 1], 8).ids[0].tolist() == expected
        assert batch.ids[number].tolist() == expected


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_after_re_ranking_all_candidates_every_index_is_exact(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    index = FaissIndex.open(built(rows, factory, tmp_path))
    k, asked = 10, queries(40)
    found = retriever(index, rows, overfetch=40).retrieve(asked, k)
    exact = retriever(ExactIndex(rows), rows).retrieve(asked, k)
    same = (found.ids == exact.ids).all(dim=1).float().mean().item()
    assert same == 1 if factory not in ("HNSW16", "PCAR8,IVF12,SQ8") else same > 0.9
    assert (found.distances >= exact.distances).all()


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_other_rows_of_a_batch_change_no_neighbour(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    searching = retriever(FaissIndex.open(built(rows, factory, tmp_path)), rows)
    asked, ks = queries(30), torch.tensor([3, 0, 12] * 10)
    batch = searching.retrieve(asked, ks)
    for index in (0, 2, 15, 29):
        alone = searching.retrieve(asked[index : index + 1], ks[index : index + 1])
        assert torch.equal(batch.row(index).ids, alone.row(0).ids)
        assert torch.equal(batch.row(index).distances, alone.row(0).distances)


@pytest.mark.parametrize("factory", ["Flat", EXACT, "IVF4,SQ8"])
def test_fewer_entries_than_asked_for_are_filled_with_minus_1(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered(60))
    index = open_index(built(rows, factory, tmp_path), rows, len(rows))
    candidates = index.search(queries(2), 50, 100, probes=4)
    assert candidates.ids.shape == (2, 100)
    assert (candidates.ids[:, 60:] == -1).all()
    assert sorted(candidates.ids[0, :60].tolist()) == list(range(60))
    found = retriever(index, rows).retrieve(queries(2), 100)
    assert found.found.sum(1).tolist() == [60, 60]
    assert torch.isfinite(found.distances[:, :60]).all()


def test_facts_are_written_and_read_back(tmp_path: Path) -> None:
    rows = rows_of(clustered())
    folder = built(rows, "IVF12,SQ8", tmp_path)
    facts = read_index_facts(folder)
    assert (facts.factory, facts.dimension, facts.entries, facts.nlist, facts.trained_on) == ("IVF12,SQ8", DIMENSION, ENTRIES, 12, ENTRIES)
    index = open_index(folder, rows, len(rows))
    assert index.entries == ENTRIES
    assert "IVF12,SQ8" in index.description
    assert "exact" in ExactIndex(rows).description
    assert ExactIndex(rows).entries == ENTRIES


def test_exact_writes_no_index_file_and_needs_no_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    rows = rows_of(clustered())
    folder = built(rows, EXACT, tmp_path)
    assert [file.name for file in folder.iterdir()] == [INDEX_METADATA]
    assert isinstance(open_index(folder, rows, len(rows)), ExactIndex)


def test_missing_faiss_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(clustered())
    folder = built(rows, "Flat", tmp_path / "built")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependency, match=r'pip install "knnlm\[cpu\]"'):
        open_index(folder, rows, len(rows))
    with pytest.raises(MissingDependency, match=r"knnlm\[gpu\]"):
        built(rows, "Flat", tmp_path / "other")


@pytest.mark.parametrize("factory", ["LSH", "IVF12,PQ4x4fs", "SQ8,RFlat", "Flat,Refine(SQ8)"])
def test_unusual_factories_work(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    index = FaissIndex.open(built(rows, factory, tmp_path))
    found = retriever(index, rows, overfetch=10).retrieve(torch.from_numpy(clustered()[:1]), 4)
    assert found.ids[0, 0] == 0


def test_a_query_of_the_wrong_width_names_both_widths(tmp_path: Path) -> None:
    index = FaissIndex.open(built(rows_of(clustered()), "Flat", tmp_path))
    with pytest.raises(IndexingError, match=r"\[2, 5\].*16"):
        index.search(torch.zeros((2, 5)), 3, 6, probes=0)


@pytest.mark.parametrize("factory", ["Flat", "IVF12,SQ8", "IVF12,RaBitQ"])
@pytest.mark.parametrize("left", [0, 3, 100, 0.5, 0.99])
def test_a_truncated_index_is_damaged_and_named(tmp_path: Path, factory: str, left: float) -> None:
    rows = rows_of(clustered())
    path = built(rows, factory, tmp_path) / INDEX_FILE
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if 0 < left < 1 else int(left)])
    with pytest.raises(StoreDamaged, match=INDEX_FILE):
        open_index(path.parent, rows, len(rows))


def test_a_missing_index_file_is_damaged_and_named(tmp_path: Path) -> None:
    rows = rows_of(clustered())
    folder = built(rows, "Flat", tmp_path)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(StoreDamaged, match=INDEX_FILE):
        open_index(folder, rows, len(rows))


def test_another_index_in_its_place_is_damaged(tmp_path: Path) -> None:
    rows = rows_of(clustered())
    one, other = built(rows, "Flat", tmp_path / "one"), built(rows_of(clustered(60)), "Flat", tmp_path / "other")
    shutil.copy(other / INDEX_FILE, one / INDEX_FILE)
    with pytest.raises(StoreDamaged, match=r"60 .*1500"):
        open_index(one, rows, len(rows))
    with pytest.raises(StoreDamaged, match=r"60 entries.*1500"):
        open_index(other, rows, len(rows))


@pytest.mark.parametrize("change", [{"entries": "many"}, {"unknown": 1}, {"nlist": None}, {"dimension": 2.5}, {"fill_rows": None}])
def test_index_metadata_that_makes_no_sense_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    rows = rows_of(clustered())
    folder = built(rows, "Flat", tmp_path)
    facts = {**read_index_facts(folder).__dict__, **change}
    write_json_with_checksum(folder / INDEX_METADATA, facts)
    with pytest.raises(StoreDamaged, match=INDEX_METADATA):
        open_index(folder, rows, len(rows))


@pytest.mark.parametrize(
    ("nlist", "entries", "k", "expected"),
    [
        (0, 1000, 8, 0),
        (12, 1500, 8, 12),
        (2000, 1_000_000, 8, 16),
        (2000, 1_000_000, 1024, 21),
        (1000, 10_000, 1024, 256),
        (64, 1000, 64, 41),
    ],
)
def test_probes_follow_k_within_their_bounds(nlist: int, entries: int, k: int, expected: int) -> None:
    assert SearchSettings(nlist, entries).for_k(k).probes == expected
    assert math.ceil(10 * k * nlist / entries) <= expected or expected in (0, nlist, 256)


def test_float16_keys_are_indexed_and_found(tmp_path: Path) -> None:
    rows = rows_of(clustered().astype(np.float16))
    index = FaissIndex.open(built(rows, "Flat", tmp_path))
    found = retriever(index, rows).retrieve(rows.gather(torch.arange(20)).float(), 1)
    assert found.ids[:, 0].tolist() == list(range(20))
    assert (found.distances == 0).all()


@pytest.mark.parametrize("factory", ["IVF12,SQ8", "PCAR8,IVF12,RaBitQ", "IVF12_HNSW8,PQ8x8np"])
def test_an_index_that_was_moved_and_made_read_only_opens_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    rows = rows_of(clustered())
    folder = built(rows, factory, tmp_path)
    before = FaissIndex.open(folder).search(queries(5), 4, 8, probes=12)
    moved = folder.rename(tmp_path / "other")
    for path in moved.iterdir():
        path.chmod(0o444)
    monkeypatch.chdir(moved)
    index = FaissIndex.open(Path())
    monkeypatch.chdir("/")
    found = index.search(queries(5), 4, 8, probes=12)
    assert torch.equal(found.ids, before.ids)
    assert torch.equal(found.distances, before.distances)


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF12,SQ8", "IVF12,RaBitQ", "PCAR8,IVF12,SQ8", "OPQ8_16,IVF12,PQ8x8np", "IVF12,PQ4x4fs", "LSH"]
)
def test_a_search_that_leaves_entries_out_finds_the_next_ones(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    index = FaissIndex.open(built(rows, factory, tmp_path))
    mask = EntryMask.without(ENTRIES, [(0, 400), (700, 1100)])
    everything = index.search(queries(6), 10, ENTRIES, probes=12)
    found = index.search(queries(6), 10, 20, probes=12, allowed=mask)
    for row in range(6):
        kept = everything.distances[row][mask.allows(everything.ids[row])][:20]
        assert mask.allows(found.ids[row]).all()
        assert len(set(found.ids[row].tolist())) == 20
        torch.testing.assert_close(found.distances[row], kept, rtol=1e-4, atol=1e-4)


def test_lists_that_do_not_hold_what_the_head_says_are_damaged(tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss")
    folder = built(rows_of(clustered()), "IVF12,SQ8", tmp_path)
    index = faiss.read_index(str(folder / INDEX_FILE))
    index.remove_ids(np.arange(3))
    index.ntotal = ENTRIES
    faiss.write_index(index, str(folder / INDEX_FILE))
    with pytest.raises(StoreDamaged, match=rf"{INDEX_FILE}.*{ENTRIES - 3} entries.*{ENTRIES}"):
        FaissIndex.open(folder)


def test_another_number_of_cells_than_the_metadata_say_is_damaged(tmp_path: Path) -> None:
    folder = built(rows_of(clustered()), "IVF12,SQ8", tmp_path)
    write_index_facts(folder, replace(read_index_facts(folder), nlist=13))
    with pytest.raises(StoreDamaged, match=r"12 cells.*13"):
        FaissIndex.open(folder)


def test_metadata_of_format_version_1_are_read(tmp_path: Path) -> None:
    folder = built(rows_of(clustered()), "IVF12,SQ8", tmp_path)
    names = ("factory", "dimension", "entries", "nlist", "trained_on", "seed", "faiss_version")
    now = read_index_facts(folder)
    write_json_with_checksum(folder / INDEX_METADATA, {name: getattr(now, name) for name in names})
    then = read_index_facts(folder)
    assert all(getattr(then, name) == getattr(now, name) for name in names)
    assert (then.cell_iterations, then.code_iterations, then.fill_rows, then.trained_entries) == (10, 25, 65_536, None)
    assert FaissIndex.open(folder).entries == ENTRIES


def test_an_index_of_10_million_entries_opens_within_a_second_and_takes_no_memory(tmp_path: Path) -> None:
    """Narrow codes that were never keys; the one test of a time, since the project promises it."""
    entries, nlist = 10_000_000, 4096
    factory, sample = f"IVF{nlist},SQ8", clustered(nlist, 4)
    train(factory, 4, sample, entries, tmp_path / "trained")
    ids = np.arange(entries)
    sizes = np.bincount(ids % nlist, minlength=nlist)
    with (tmp_path / "part").open("wb") as file:
        file.write(lists_head(sizes, 4))
        for number in range(nlist):
            file.write(np.full(4 * sizes[number], number % 256, np.uint8).tobytes() + ids[number::nlist].tobytes())
    merge_parts(tmp_path / "trained", [tmp_path / "part"], tmp_path / "index")
    before, start = private_bytes(), time.perf_counter()
    index = FaissIndex.open(tmp_path / "index")
    taken = time.perf_counter() - start
    assert index.entries == entries
    assert taken < 1
    assert private_bytes() - before < 20e6
    assert (index.search(torch.from_numpy(sample[:3]), 5, 10, probes=4).ids >= 0).all()


def private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    return (
        sum(int(line.split()[1]) for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Anonymous:"))
        * 1024
    )


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exact_search_is_the_same_with_all_keys_on_the_device(dtype: type) -> None:
    keys = clustered().astype(dtype)
    rows = rows_of(keys)
    tiled, resident = ExactIndex(rows, tile=100), ExactIndex(rows, tile=100, resident=keys.nbytes)
    assert tiled._resident is None
    assert ExactIndex(rows, resident=keys.nbytes - 1)._resident is None
    assert resident._resident is not None
    assert resident._resident.dtype == torch.from_numpy(keys).dtype
    mask = EntryMask.without(ENTRIES, [(5, 300)])
    for allowed in (None, mask):
        one, other = (index.search(queries(9), 7, 14, allowed=allowed) for index in (tiled, resident))
        assert torch.equal(one.ids, other.ids)
        torch.testing.assert_close(one.distances, other.distances, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("factory", [EXACT, "Flat", "IVF12,SQ8", "IVF12,PQ16x8np"])
def test_a_gpu_finds_what_the_cpu_finds(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    folder = built(rows, factory, tmp_path)
    try:
        on_gpu = open_index(folder, rows, len(rows), "cuda")
    except MissingDependency as missing:
        pytest.skip(str(missing))
    asked, ks = queries(50), torch.tensor([4, 10] * 25)
    here = retriever(open_index(folder, rows, len(rows)), rows, overfetch=20).retrieve(asked, ks)
    there = retriever(on_gpu, rows, overfetch=20).retrieve(asked, ks)
    assert (here.ids == there.ids).float().mean() > 0.999
    torch.testing.assert_close(here.distances, there.distances, rtol=1e-5, atol=1e-5)
