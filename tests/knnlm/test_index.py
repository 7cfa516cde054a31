"""Indexes: whatever finds the candidates, retrieval gives what exact search gives; and what is refused, in words."""

from __future__ import annotations

import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.reader import ShardedRows
from knnlm.errors import IndexingError, InvalidInput, KNNLMError, MissingDependency, StoreDamaged
from knnlm.index import (
    EXACT,
    INDEX_FILE,
    INDEX_METADATA,
    ExactIndex,
    FaissIndex,
    NeighborIndex,
    build_index,
    choose_factory,
    open_index,
    read_index_facts,
    training_sample,
)
from knnlm.retrieval import Retriever
from knnlm.search_settings import SearchSettings
from tests import reference

DIMENSION = 16
ENTRIES = 1500
# With 12 cells every search looks into all of them (never fewer than 16), so only the codes are inexact.
APPROXIMATE = ["IVF12,Flat", "IVF12,SQ8", "IVF12,PQ16x8np", "IVF12,RaBitQ", "PCAR8,IVF12,SQ8", "OPQ8_16,IVF12,PQ8x8np", "SQ8", "HNSW16"]


def clustered(entries: int = ENTRIES, dimension: int = DIMENSION, seed: int = 0) -> np.ndarray:
    """Keys in clusters, some of them several times."""
    chance = np.random.default_rng(seed)
    centres = 3 * chance.normal(size=(20, dimension))
    keys = (centres[chance.integers(0, 20, entries)] + chance.normal(size=(entries, dimension))).astype(np.float32)
    keys[entries // 2 : entries // 2 + 20] = keys[:20]
    return keys


def rows_of(keys: np.ndarray) -> ShardedRows:
    cut = len(keys) // 3
    return ShardedRows([keys[:cut].copy(), keys[cut:].copy()], [0, cut]) if cut else ShardedRows([keys], [0])


def built(keys: ShardedRows, factory: str, folder: Path, dimension: int = DIMENSION) -> Path:
    for stage, done, total in build_index(keys, dimension, factory, folder):
        assert stage
        assert 0 <= done <= total
    return folder


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


@pytest.mark.parametrize("factory", ["Flat", *APPROXIMATE[:-1]])
def test_the_same_keys_give_the_same_bytes(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    one, other = (built(rows, factory, tmp_path / name) for name in ("one", "other"))
    for file in (INDEX_FILE, INDEX_METADATA):
        assert (one / file).read_bytes() == (other / file).read_bytes()


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


@pytest.mark.parametrize("factory", ["", "Flatt", "IVF", "IVF12", "NOSUCH8,Flat", "PQ7x8np", "IVF12,PQ5x8np"])
def test_a_bad_factory_string_is_refused_by_name(tmp_path: Path, factory: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        built(rows_of(clustered()), factory, tmp_path)
    assert refused.value.field == "index"
    assert repr(factory) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IDMap2,Flat", "IVF12,Flat,RFlat", "PCAR64,Flat"])
def test_factories_that_cannot_hold_these_entries_are_refused_by_name(tmp_path: Path, factory: str) -> None:
    with pytest.raises(KNNLMError, match=re.escape(repr(factory))) as refused:
        built(rows_of(clustered()), factory, tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("factory", ["LSH", "IVF12,PQ4x4fs", "SQ8,RFlat", "Flat,Refine(SQ8)"])
def test_unusual_factories_work(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    index = FaissIndex.open(built(rows, factory, tmp_path))
    found = retriever(index, rows, overfetch=10).retrieve(torch.from_numpy(clustered()[:1]), 4)
    assert found.ids[0, 0] == 0


def test_too_few_keys_to_train_codes_with_is_said(tmp_path: Path) -> None:
    with pytest.raises(KNNLMError, match="PQ4x8np"):
        built(rows_of(clustered(60)), "PQ4x8np", tmp_path)


def test_more_cells_than_entries_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"100 cells.*60 entries"):
        built(rows_of(clustered(60)), "IVF100,SQ8", tmp_path)


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
        open_index(tmp_path, rows, len(rows))


def test_a_missing_index_file_is_damaged_and_named(tmp_path: Path) -> None:
    rows = rows_of(clustered())
    (built(rows, "Flat", tmp_path) / INDEX_FILE).unlink()
    with pytest.raises(StoreDamaged, match=INDEX_FILE):
        open_index(tmp_path, rows, len(rows))


def test_another_index_in_its_place_is_damaged(tmp_path: Path) -> None:
    rows = rows_of(clustered())
    one, other = built(rows, "Flat", tmp_path / "one"), built(rows_of(clustered(60)), "Flat", tmp_path / "other")
    shutil.copy(other / INDEX_FILE, one / INDEX_FILE)
    with pytest.raises(StoreDamaged, match=r"60 .*1500"):
        open_index(one, rows, len(rows))
    with pytest.raises(StoreDamaged, match=r"60 entries.*1500"):
        open_index(other, rows, len(rows))


@pytest.mark.parametrize("change", [{"entries": "many"}, {"unknown": 1}, {"nlist": None}, {"dimension": 2.5}])
def test_index_metadata_that_makes_no_sense_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    rows = rows_of(clustered())
    folder = built(rows, "Flat", tmp_path)
    facts = {**read_index_facts(folder).__dict__, **change}
    write_json_with_checksum(folder / INDEX_METADATA, facts)
    with pytest.raises(StoreDamaged, match=INDEX_METADATA):
        open_index(folder, rows, len(rows))


@pytest.mark.parametrize(
    ("entries", "dimension", "gpu", "expected"),
    [
        (1, 256, False, "Flat"),
        (50_000, 256, False, "Flat"),
        (50_001, 256, False, "IVF447,SQ8"),
        (1_000_000, 768, False, "IVF2000,SQ8"),
        (1_000_000, 2048, False, "PCAR512,IVF2000,SQ8"),
        (1_000_001, 1024, False, "IVF4000,RaBitQ"),
        (10_000_000, 1600, False, "PCAR512,IVF12649,RaBitQ"),
        (10_000_000, 768, True, "IVF12649,PQ96x8np"),
        (10_000_000, 1024, True, "IVF12649,PQ64x8np"),
        (10_000_000, 2560, True, "PCAR512,IVF12649,PQ64x8np"),
        (100_000_000, 768, False, "IVF65536_HNSW32,RaBitQ"),
        (100_000_000, 768, True, "IVF65536_HNSW32,PQ96x8np"),
        (100_000_001, 768, False, "OPQ64_256,IVF262144_HNSW32,PQ64x8np"),
    ],
)
def test_the_automatic_choice(entries: int, dimension: int, gpu: bool, expected: str) -> None:
    assert choose_factory(entries, dimension, gpu=gpu) == expected


@pytest.mark.parametrize("dimension", [20, 256, 1030])
@pytest.mark.parametrize("entries", [10, 60_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("gpu", [False, True])
def test_faiss_knows_every_automatic_choice(entries: int, dimension: int, gpu: bool) -> None:
    faiss = pytest.importorskip("faiss")
    factory = choose_factory(entries, dimension, gpu=gpu)
    assert faiss.index_factory(dimension, factory).d == dimension


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


def test_the_training_sample_is_sorted_without_repetition_and_always_the_same() -> None:
    sample = training_sample(1000, 100)
    assert sample.tolist() == sorted(set(sample.tolist()))
    assert len(sample) == 100
    assert torch.equal(sample, training_sample(1000, 100))
    assert training_sample(5, 100).tolist() == [0, 1, 2, 3, 4]


def test_float16_keys_are_indexed_and_found(tmp_path: Path) -> None:
    rows = rows_of(clustered().astype(np.float16))
    index = FaissIndex.open(built(rows, "Flat", tmp_path))
    found = retriever(index, rows).retrieve(rows.gather(torch.arange(20)).float(), 1)
    assert found.ids[:, 0].tolist() == list(range(20))
    assert (found.distances == 0).all()


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
