"""Merging, extending and filtering on disk: byte for byte what FAISS would have written, wherever a build was killed."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import pytest
import torch

from knnlm.datastore.files import write_json_with_checksum
from knnlm.datastore.reader import ShardedRows
from knnlm.errors import StoreDamaged
from knnlm.index import EXACT, INDEX_FILE, INDEX_METADATA, FaissIndex, read_index_facts
from knnlm.index_check import index_problems
from knnlm.inverted_lists import InvertedLists, lists_head
from knnlm_index_builder import build_index as building
from knnlm_index_builder.build_index import build_index, extend_index
from knnlm_index_builder.fill_index import fill_whole
from knnlm_index_builder.merge_index import filter_part, is_mergeable, merge_parts, trained_of
from knnlm_index_builder.plan_index import plan_index
from knnlm_index_builder.train_index import one_thread, steady_faiss, transforms
from tests.indexes import DIMENSION, ENTRIES, MERGEABLE, built, clustered, files, part, rows_of, shards_of, trained

CUTS = (0, 500, 501, ENTRIES)


def parts_of(index: Path, keys: np.ndarray, folder: Path, cuts: Sequence[int] = CUTS) -> list[Path]:
    return [part(index, keys, start, end, folder / f"part{start}") for start, end in itertools.pairwise(cuts)]


@pytest.mark.parametrize("factory", MERGEABLE)
def test_merged_parts_are_what_faiss_writes_of_an_index_in_memory(tmp_path: Path, factory: str) -> None:
    keys, index = clustered(), trained(factory, tmp_path / "trained")
    merge_parts(index, parts_of(index, keys, tmp_path), tmp_path / "index")
    whole = faiss.read_index(str(index / INDEX_FILE))
    inner = faiss.extract_index_ivf(whole)
    with steady_faiss(), one_thread():
        for start, end in itertools.pairwise(CUTS):
            rows = keys[start:end]
            for transform in transforms(whole):
                rows = transform.apply(rows)
            inner.add_with_ids(rows, np.arange(start, end))
    whole.ntotal = inner.ntotal
    faiss.write_index(whole, str(tmp_path / "whole"))
    assert (tmp_path / "index" / INDEX_FILE).read_bytes() == (tmp_path / "whole").read_bytes()
    assert read_index_facts(tmp_path / "index") == replace(read_index_facts(index), entries=ENTRIES)
    assert list(index_problems(tmp_path / "index", ENTRIES)) == []


@pytest.mark.parametrize("factory", ["IVF12,SQ8", "IVF900,RaBitQ", "IMI2x2,PQ8x8np"])
def test_ids_ascend_in_each_list_and_stand_beside_their_codes(tmp_path: Path, factory: str) -> None:
    made = trained(factory, tmp_path / "trained")
    merge_parts(made, parts_of(made, clustered(), tmp_path), tmp_path / "index")
    lists = InvertedLists.of_index(tmp_path / "index")
    index = faiss.read_index(str(tmp_path / "index" / INDEX_FILE))
    found = index.invlists
    for number in range(len(lists.sizes)):
        ids = np.concatenate([np.zeros(0, np.int64), *lists.ids(number)])
        codes = np.concatenate([np.zeros((0, lists.code_size), np.uint8), *lists.codes(number)])
        assert (np.diff(ids) > 0).all()
        assert found.list_size(number) == lists.sizes[number] == len(ids)
        if len(ids):
            assert np.array_equal(faiss.rev_swig_ptr(found.get_ids(number), len(ids)), ids)
            assert np.array_equal(faiss.rev_swig_ptr(found.get_codes(number), codes.size).reshape(codes.shape), codes)


class Grown(NamedTuple):
    """The same keys in one index: built at once, and grown from the first shard."""

    once: Path
    grown: Path


def grown(factory: str, folder: Path, base: Path | None = None) -> Grown:
    """Both with what the first shard trained; ``base``: an index of the first shard, if it is there already."""
    rows, shards = rows_of(clustered()), shards_of(ENTRIES)
    first = ShardedRows([clustered()[: shards[0].entries]], [0])
    if base is None:
        base = folder / "base"
        list(build_index(first, DIMENSION, shards[:1], plan_index(factory, DIMENSION, len(first)), base, folder / "scratch"))
    list(extend_index(base, rows, shards[1:], folder / "grown", folder / "scratch"))
    assert not (folder / "scratch").exists()
    if factory == EXACT:
        return Grown(built(rows, EXACT, folder), folder / "grown")
    made = folder / "trained"
    trained_of(base, made)
    if is_mergeable(made):
        merge_parts(made, parts_of(made, clustered(), folder, [0, shards[0].entries, ENTRIES]), folder / "once")
    else:
        fill_whole(made, [(0, torch.from_numpy(clustered()))], folder / "once")
    return Grown(folder / "once", folder / "grown")


@pytest.mark.parametrize("factory", ["Flat", EXACT, "SQ8", "IVF12,PQ8x4fs", *MERGEABLE[:6]])
def test_an_index_that_was_extended_is_one_that_was_built_at_once(tmp_path: Path, factory: str) -> None:
    once, extended = grown(factory, tmp_path)
    assert files(extended) == files(once)
    assert list(index_problems(extended, ENTRIES)) == []


@pytest.mark.parametrize("factory", ["Flat", "IVF12,SQ8", "PCAR8,IVF12,SQ8"])
def test_an_index_of_format_version_1_is_extended(tmp_path: Path, factory: str) -> None:
    """It was made by FAISS in memory, with a table of ids both ways around what has no lists."""
    base, count = tmp_path / "base", shards_of(ENTRIES)[0].entries
    base.mkdir()
    index = faiss.index_factory(DIMENSION, factory)
    inverted = faiss.try_extract_index_ivf(index)
    index = faiss.IndexIDMap2(index) if inverted is None else index
    index.train(clustered()[:count])
    index.add_with_ids(clustered()[:count], np.arange(count))
    faiss.write_index(index, str(base / INDEX_FILE))
    facts = {"factory": factory, "dimension": DIMENSION, "entries": count, "nlist": 12 if inverted else 0}
    write_json_with_checksum(base / INDEX_METADATA, {**facts, "trained_on": count, "seed": 1, "faiss_version": "1.13"})
    _, extended = grown(factory, tmp_path, base)
    assert list(index_problems(extended, ENTRIES)) == []
    assert read_index_facts(extended).trained_entries == (count if inverted else None)
    found = FaissIndex.open(extended).search(torch.from_numpy(clustered()[::50]), 1, 1, probes=12).ids[:, 0]
    # Keys 750 to 769 are copies of the first ones.
    assert [number % 750 for number in found.tolist()] == [number % 750 for number in range(0, ENTRIES, 50)]


def test_the_trained_part_of_an_index_is_the_one_it_was_made_with(tmp_path: Path) -> None:
    for factory in ("IVF12,PQ8x8np", "PCAR8,IVF12_HNSW8,SQ8", "Flat", "SQ8"):
        folder = tmp_path / factory
        index = trained(factory, folder / "trained")
        if is_mergeable(index):
            merge_parts(index, parts_of(index, clustered(), folder), folder / "index")
        else:
            fill_whole(index, [(0, torch.from_numpy(clustered()))], folder / "index")
        trained_of(folder / "index", folder / "again")
        assert files(folder / "again") == files(index)


class Killed(BaseException):
    """Ends a build as a signal would: nothing may catch it."""


@pytest.mark.parametrize("factory", ["Flat", EXACT, "IVF12,SQ8"])
def test_killed_at_each_write_to_disk_a_build_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str) -> None:
    rows, shards, plan = rows_of(clustered()), shards_of(ENTRIES), plan_index(factory, DIMENSION, ENTRIES)
    whole, real = built(rows, factory, tmp_path / "whole"), os.fsync
    filled: list[str] = []
    fill = building.fill_part
    monkeypatch.setattr(building, "fill_part", lambda *arguments: (fill(*arguments), filled.append(arguments[2].name)))
    for allowed in itertools.count():
        left = itertools.count(allowed, -1)

        def fsync(descriptor: int, left: Iterator[int] = left) -> None:
            if next(left) == 0:
                raise Killed
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                list(build_index(rows, DIMENSION, shards, plan, tmp_path / "index", tmp_path / "scratch"))
                break
            except Killed:
                assert allowed < 100
    assert files(tmp_path / "index") == files(whole)
    assert not (tmp_path / "scratch").exists()
    # The same scratch folder served all attempts, so no finished part was made again.
    assert filled == ([f"{shard.name}.lists" for shard in shards] if plan.mergeable else [])


def test_a_scratch_folder_of_another_index_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, shards = rows_of(clustered()), shards_of(ENTRIES)

    def killed(*_: object) -> None:
        raise Killed

    for factory in ("IVF12,SQ8", "IVF12,RaBitQ", "IVF13,SQ8"):
        with monkeypatch.context() as patch:
            patch.setattr(building, "merge_parts", killed)
            with pytest.raises(Killed):
                list(build_index(rows, DIMENSION, shards, plan_index(factory, DIMENSION, ENTRIES), tmp_path / "i", tmp_path / "scratch"))
    list(build_index(rows, DIMENSION, shards, plan_index("IVF12,SQ8", DIMENSION, ENTRIES), tmp_path / "i", tmp_path / "scratch"))
    assert files(tmp_path / "i") == files(built(rows, "IVF12,SQ8", tmp_path))


def test_an_index_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    rows = rows_of(clustered())
    folder = built(rows, "IVF12,SQ8", tmp_path)
    before = (folder / INDEX_FILE).stat().st_mtime_ns
    assert built(rows, "IVF12,SQ8", tmp_path) == folder
    assert (folder / INDEX_FILE).stat().st_mtime_ns == before


def test_a_merge_that_does_not_fit_on_the_disk_is_refused_before_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = trained("IVF12,SQ8", tmp_path / "trained")
    parts = parts_of(index, clustered(), tmp_path)
    merge_parts(index, parts, tmp_path / "index")
    size = (tmp_path / "index" / INDEX_FILE).stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(OSError, match=r"No space left for the index: it needs .*, and .* are free") as refused:
        merge_parts(index, parts, tmp_path / "other")
    assert refused.value.filename == str(tmp_path)
    assert not list(tmp_path.glob("other*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + 1000))
    merge_parts(index, parts, tmp_path / "other")


@pytest.mark.parametrize("other", ["IVF12,SQ4", "IVF13,SQ8"])
def test_a_part_of_another_index_is_refused_by_name(tmp_path: Path, other: str) -> None:
    index, foreign = trained("IVF12,SQ8", tmp_path / "trained"), trained(other, tmp_path / "foreign")
    parts = [part(index, clustered(), 0, 10, tmp_path / "good"), part(foreign, clustered(), 10, 20, tmp_path / "bad")]
    with pytest.raises(StoreDamaged, match=r"bad has .* belongs to another index"):
        merge_parts(index, parts, tmp_path / "index")


@pytest.mark.parametrize("factory", ["Flat", "IVF12,PQ8x4fs"])
def test_an_index_that_is_filled_whole_takes_no_parts(tmp_path: Path, factory: str) -> None:
    index = trained(factory, tmp_path / "trained")
    with pytest.raises(StoreDamaged, match="no index that parts can be merged into"):
        merge_parts(index, [], tmp_path / "index")
    with pytest.raises(StoreDamaged, match="plain inverted lists"):
        filter_part(index, np.ones(ENTRIES, bool), tmp_path / "part")


@pytest.mark.parametrize("left", [0, 3, 40, 0.5, 0.99, 1.01])
def test_a_part_of_another_length_is_damaged_and_named(tmp_path: Path, left: float) -> None:
    index = trained("IVF12,SQ8", tmp_path / "trained")
    path = part(index, clustered(), 0, ENTRIES, tmp_path / "part")
    content = path.read_bytes()
    size = round(left * len(content)) if 0 < left < 2 else int(left)
    path.write_bytes((content + content)[:size])
    with pytest.raises(StoreDamaged, match=f"{path} is damaged"):
        merge_parts(index, [path], tmp_path / "index")


@pytest.mark.parametrize("factory", ["IVF12,Flat", "IVF12,SQ8", "IVF900,RaBitQ", "IVF12,PQ8x8np", "IVF12_HNSW8,SQ8"])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_kept_of_an_index_is_an_index_of_what_is_kept(tmp_path: Path, factory: str, share: float) -> None:
    """Byte for byte one that never held the others, so nothing of them is left."""
    keys, index = clustered(), trained(factory, tmp_path / "trained")
    merge_parts(index, parts_of(index, keys, tmp_path), tmp_path / "index")
    kept = np.random.default_rng(1).random(ENTRIES) < share
    filter_part(tmp_path / "index", kept, tmp_path / "kept")
    merge_parts(index, [tmp_path / "kept"], tmp_path / "filtered")
    fresh = part(index, keys[kept], 0, int(kept.sum()), tmp_path / "fresh")
    merge_parts(index, [fresh], tmp_path / "expected")
    assert files(tmp_path / "filtered") == files(tmp_path / "expected")
    assert list(index_problems(tmp_path / "filtered", int(kept.sum()))) == []


def test_ids_that_no_entry_has_stop_a_filter(tmp_path: Path) -> None:
    index = trained("IVF12,SQ8", tmp_path / "trained")
    merge_parts(index, parts_of(index, clustered(), tmp_path), tmp_path / "index")
    with pytest.raises(StoreDamaged, match=r"index\.faiss is damaged: it has ids from"):
        filter_part(tmp_path / "index", np.ones(ENTRIES - 1, bool), tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


MERGE = """
import resource, sys
from pathlib import Path
import numpy as np
from knnlm_index_builder.merge_index import filter_part, merge_parts

folder, count, entries = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
merge_parts(folder / "trained", [folder / "part"] * count, folder / f"index{count}")
filter_part(folder / f"index{count}", np.arange(entries) % 2 == 0, folder / f"kept{count}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.parametrize("cells", [4, 512])
def test_ten_times_as_many_entries_are_merged_and_filtered_in_the_same_memory(tmp_path: Path, cells: int) -> None:
    """Long lists as well as short ones; what a build takes is bounded by its parts, not by their number."""
    trained(f"IVF{cells},SQ8", tmp_path / "trained", clustered(2000, 64))
    entries = 100_000
    sizes = np.full(cells, entries // cells)
    entries = int(sizes.sum())
    with (tmp_path / "part").open("wb") as file:
        file.write(lists_head(sizes, 64))
        for number, size in enumerate(sizes.tolist()):
            file.write(bytes(64 * size) + np.arange(number, entries, cells)[:size].tobytes())
    peaks = []
    for count in (1, 10):
        line = [sys.executable, "-c", MERGE, str(tmp_path), str(count), str(10 * entries)]
        peaks.append(int(subprocess.run(line, capture_output=True, text=True, check=True, timeout=120).stdout))
    # Ten parts hold 72 MB of codes and ids.
    assert peaks[1] - peaks[0] < 24e6
