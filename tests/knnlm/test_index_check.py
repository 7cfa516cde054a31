"""What is wrong with an index and FAISS does not say: each in one sentence."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from knnlm.errors import StoreDamaged
from knnlm.index import EXACT, INDEX_FILE, FaissIndex, read_index_facts
from knnlm.index_check import index_problems
from knnlm.inverted_lists import InvertedLists, imbalance, list_sizes
from tests.indexes import ENTRIES, MERGEABLE, WHOLE, built, clustered, part, rows_of, trained


def changed(folder: Path, change: object) -> list[str]:
    """Problems after ``change`` was made to the index's file."""
    index = faiss.read_index(str(folder / INDEX_FILE))
    change(index)  # type: ignore[operator]
    faiss.write_index(index, str(folder / INDEX_FILE))
    return list(index_problems(folder, ENTRIES))


@pytest.mark.parametrize("factory", [*MERGEABLE, *WHOLE, EXACT])
def test_a_good_index_has_no_problem(tmp_path: Path, factory: str) -> None:
    assert list(index_problems(built(rows_of(clustered()), factory, tmp_path), ENTRIES)) == []


@pytest.mark.parametrize("factory", ["IVF12,SQ8", "IVF12,PQ8x4fs"])
def test_an_entry_that_is_missing_and_one_that_is_there_twice_are_named(tmp_path: Path, factory: str) -> None:
    folder = built(rows_of(clustered()), factory, tmp_path)

    def double(index: faiss.Index) -> None:
        index.remove_ids(np.array([40, 70]))
        index.add_with_ids(clustered()[8:10], np.array([8, 8]))

    problems = changed(folder, double)
    assert len(problems) == 2
    assert "holds entries more than once, such as 8." in problems[0]
    assert f"lacks 2 of {ENTRIES} entries, the first of them 40" in problems[1]
    assert all(str(folder / INDEX_FILE) in problem for problem in problems)


@pytest.mark.parametrize("number", [-1, ENTRIES])
def test_a_number_that_no_entry_has_is_named(tmp_path: Path, number: int) -> None:
    folder = built(rows_of(clustered()), "IVF12,SQ8", tmp_path)

    def stray(index: faiss.Index) -> None:
        index.remove_ids(np.array([7]))
        index.add_with_ids(clustered()[7:8], np.array([number]))

    problems = changed(folder, stray)
    assert f"holds 1 ids that no entry has, such as {number}." in problems[0]
    assert "lacks 1" in problems[1]


def test_the_table_of_ids_is_looked_at_where_there_are_no_lists(tmp_path: Path) -> None:
    folder = built(rows_of(clustered()), "Flat", tmp_path)

    def double(index: faiss.Index) -> None:
        ids = faiss.vector_to_array(index.id_map)
        ids[5] = 6
        faiss.copy_array_to_vector(ids, index.id_map)

    assert ["more than once, such as 6." in problem or "first of them 5" in problem for problem in changed(folder, double)] == [True, True]


def test_a_cell_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """FAISS opens and searches it, and never finds the cell's entries."""
    folder = built(rows_of(clustered()), "IVF12,SQ8", tmp_path)

    def spoil(index: faiss.Index) -> None:
        centroids = index.quantizer.reconstruct_n(0, 12)
        centroids[3, 0] = np.nan
        index.quantizer.reset()
        index.quantizer.add(centroids)

    problems = changed(folder, spoil)
    assert len(problems) == 1
    assert "not finite, that of cell 3" in problems[0]
    found = FaissIndex.open(folder).search(torch.from_numpy(clustered()[:50]), 1, ENTRIES, probes=12)
    assert (found.ids == -1).any()


def test_a_key_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = built(rows_of(clustered()), "Flat", tmp_path)

    def spoil(index: faiss.Index) -> None:
        keys = clustered()
        keys[1234, 2] = np.inf
        index.reset()
        index.add_with_ids(keys, np.arange(ENTRIES))

    assert "not finite, that of entry 1234" in changed(folder, spoil)[0]


def test_another_number_of_entries_is_said(tmp_path: Path) -> None:
    problems = list(index_problems(built(rows_of(clustered()), "IVF12,SQ8", tmp_path), ENTRIES + 5))
    assert f"indexes {ENTRIES} entries, but the datastore has {ENTRIES + 5}" in problems[0]
    assert f"lacks 5 of {ENTRIES + 5}" in problems[1]


def test_an_index_that_can_not_be_read_is_one_problem(tmp_path: Path) -> None:
    folder = built(rows_of(clustered()), "IVF12,SQ8", tmp_path)
    path = folder / INDEX_FILE
    path.write_bytes(path.read_bytes()[:-100])
    assert ["damaged" in problem for problem in index_problems(folder, ENTRIES)] == [True]
    path.unlink()
    assert len(list(index_problems(folder, ENTRIES))) == 1


@pytest.mark.parametrize("factory", ["IVF12,SQ8", "IVF900,RaBitQ", "PCAR8,IVF12,SQ8", "IVF12,PQ8x4fs"])
def test_sizes_and_imbalance_of_lists_are_those_that_faiss_knows(tmp_path: Path, factory: str) -> None:
    folder = built(rows_of(clustered()), factory, tmp_path)
    index = faiss.read_index(str(folder / INDEX_FILE))
    lists = faiss.extract_index_ivf(index).invlists
    sizes = list_sizes(folder)
    assert sizes.tolist() == [lists.list_size(number) for number in range(read_index_facts(folder).nlist)]
    assert sizes.sum() == ENTRIES
    assert imbalance(sizes) == pytest.approx(lists.imbalance_factor())


def test_an_index_without_lists_has_no_sizes_and_no_imbalance(tmp_path: Path) -> None:
    sizes = list_sizes(built(rows_of(clustered()), "Flat", tmp_path))
    assert sizes.tolist() == []
    assert imbalance(sizes) == 1
    assert imbalance(np.array([5, 5, 5])) == 1
    assert imbalance(np.array([15, 0, 0])) == 3


@pytest.mark.parametrize("factory", ["IVF12,SQ8", "IVF900,SQ8"])
def test_a_flipped_bit_in_the_sizes_of_lists_is_damage_and_no_crash(tmp_path: Path, factory: str) -> None:
    folder = built(rows_of(clustered()), factory, tmp_path)
    path = folder / INDEX_FILE
    content = path.read_bytes()
    start = content.index(b"ilar")
    for at in range(start, start + 32 + 8 * 12, 3):
        damaged = bytearray(content)
        damaged[at] ^= 0x81
        path.write_bytes(damaged)
        with pytest.raises(StoreDamaged, match=str(path)):
            InvertedLists(path, start)


def test_flipped_bits_in_sparse_lists_never_crash(tmp_path: Path) -> None:
    """Where few lists hold entries, their numbers stand beside their sizes; a wrong number may look right."""
    path = part(trained("IVF900,SQ8", tmp_path / "trained"), clustered(), 0, 20, tmp_path / "part")
    content = path.read_bytes()
    assert b"sprs" in content[:32]
    refused = 0
    for at in range(32 + 16 * 12):
        damaged = bytearray(content)
        damaged[at] ^= 0x81
        path.write_bytes(damaged)
        try:
            lists = InvertedLists(path)
        except StoreDamaged as damage:
            refused += str(path) in str(damage)
        else:
            assert lists.sizes.sum() == 20
    assert refused > 150
