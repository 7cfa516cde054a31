"""Training and filling: the same keys give the same bytes, however many threads there are and however they are cut."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.errors import IndexingError, NonFiniteKey
from knnlm.index import INDEX_FILE, read_index_facts, write_index_facts
from knnlm_index_builder.fill_index import fill_part, fill_whole
from knnlm_index_builder.merge_index import merge_parts
from knnlm_index_builder.train_index import fill_rows, gather_sample, new_index, train, training_sample
from tests.indexes import DIMENSION, ENTRIES, MERGEABLE, WHOLE, built, clustered, faiss_threads, files, part, rows_of, trained

# Enough keys that FAISS would share the work among threads.
MANY, WIDE = 6000, 64


@pytest.mark.parametrize("factory", MERGEABLE + WHOLE)
def test_the_same_keys_give_the_same_bytes(tmp_path: Path, factory: str) -> None:
    rows = rows_of(clustered())
    one, other = (built(rows, factory, tmp_path / name) for name in ("one", "other"))
    assert files(one) == files(other)


def test_the_training_sample_is_sorted_without_repetition_and_always_the_same() -> None:
    sample = training_sample(1000, 100)
    assert sample.tolist() == sorted(set(sample.tolist()))
    assert len(sample) == 100
    assert torch.equal(sample, training_sample(1000, 100))
    assert training_sample(5, 100).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("factory", ["IVF64,SQ8", "PCAR24,IVF64,RaBitQ", "IVF300_HNSW16,RaBitQ", "IVF64,PQ8x8np", "OPQ8_16,IVF64,SQ8"])
def test_any_number_of_threads_and_any_index_opened_before_give_the_same_bytes(tmp_path: Path, factory: str) -> None:
    # Far from the origin distances cancel, so that last bits decide between cells.
    keys = 1000 + clustered(MANY, WIDE)
    for count, threshold in ((1, 6), (3, 10**9)):
        folder = tmp_path / str(count)
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = threshold
        with faiss_threads(count):
            made = trained(factory, folder / "trained", keys)
            merge_parts(made, [part(made, keys, 0, 4000, folder / "a"), part(made, keys, 4000, MANY, folder / "b")], folder / "index")
            assert faiss.omp_get_max_threads() == count
        assert faiss.cvar.distance_compute_blas_threshold == threshold
        faiss.cvar.distance_compute_blas_threshold = before
    for name in ("trained", "index"):
        assert files(tmp_path / "1" / name) == files(tmp_path / "3" / name)


@pytest.mark.parametrize("factory", ["HNSW16", "PCAR24,Flat"])
def test_threads_change_nothing_of_an_index_that_is_filled_whole(tmp_path: Path, factory: str) -> None:
    keys = clustered(MANY, WIDE)
    for count in (1, 3):
        with faiss_threads(count):
            made = trained(factory, tmp_path / f"trained{count}", keys)
            fill_whole(made, [(0, torch.from_numpy(keys))], tmp_path / str(count))
    assert files(tmp_path / "1") == files(tmp_path / "3")


@pytest.fixture(scope="module")
def stepping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained index behind a rotation that is filled 100 keys at a time."""
    folder = trained("PCAR8,IVF12,SQ8", tmp_path_factory.mktemp("stepping") / "trained")
    write_index_facts(folder, replace(read_index_facts(folder), fill_rows=100))
    return folder


@given(cuts=st.sets(st.integers(1, ENTRIES - 1), max_size=12))
def test_how_keys_arrive_changes_nothing(stepping: Path, cuts: set[int]) -> None:
    keys, borders = clustered(), sorted({0, ENTRIES, *cuts})
    whole = part(stepping, keys, 0, ENTRIES, stepping.parent / "whole").read_bytes()
    pieces = [(start, torch.from_numpy(keys[start:end])) for start, end in itertools.pairwise(borders)]
    counts: list[int] = []
    fill_part(stepping, pieces, stepping.parent / "cut", told=counts.append)
    assert (stepping.parent / "cut").read_bytes() == whole
    assert counts == [100] * 15


def test_keys_of_half_precision_are_coded_as_they_are(tmp_path: Path) -> None:
    keys = clustered().astype(np.float16)
    index = trained("IVF12,SQ8", tmp_path / "trained")
    half, single = part(index, keys, 0, ENTRIES, tmp_path / "half"), part(index, keys.astype(np.float32), 0, ENTRIES, tmp_path / "single")
    assert half.read_bytes() == single.read_bytes()


@pytest.mark.parametrize(("dimension", "expected"), [(1, 65_536), (256, 65_536), (257, 65_280), (4096, 4096), (1 << 25, 1)])
def test_keys_are_coded_in_steps_that_depend_on_their_width_alone(dimension: int, expected: int) -> None:
    assert fill_rows(dimension) == expected


def test_a_sample_is_gathered_as_float32_in_its_order() -> None:
    keys = clustered().astype(np.float16)
    sample = training_sample(ENTRIES, 300)
    rows = gather_sample(rows_of(keys), sample, DIMENSION)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, keys[sample.numpy()].astype(np.float32))


def test_how_an_index_was_trained_is_noted(tmp_path: Path) -> None:
    facts = train("PCAR8,IVF12,PQ8x8np", DIMENSION, clustered(700), ENTRIES, tmp_path / "trained")
    assert facts == read_index_facts(tmp_path / "trained")
    index = new_index("IVF12,PQ8x8np", DIMENSION)
    assert (facts.entries, facts.nlist, facts.trained_on, facts.trained_entries) == (0, 12, 700, ENTRIES)
    assert (facts.seed, facts.cell_iterations, facts.code_iterations) == (index.cp.seed, index.cp.niter, index.pq.cp.niter)
    assert facts.points_per_list == index.pq.cp.max_points_per_centroid
    assert facts.faiss_version == faiss.__version__
    assert (facts.factory, facts.dimension, facts.fill_rows) == ("PCAR8,IVF12,PQ8x8np", DIMENSION, fill_rows(DIMENSION))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_not_finite_is_refused_with_its_number(tmp_path: Path, wrong: float) -> None:
    """FAISS would take it, and never find it."""
    keys = clustered()
    index, whole = trained("IVF12,SQ8", tmp_path / "trained"), trained("Flat", tmp_path / "flat")
    keys[1234, 5] = wrong
    with pytest.raises(NonFiniteKey, match="training sample"):
        train("IVF12,SQ8", DIMENSION, keys, ENTRIES, tmp_path / "other")
    with pytest.raises(NonFiniteKey, match="entry 1234 "):
        part(index, keys, 1000, ENTRIES, tmp_path / "part")
    with pytest.raises(NonFiniteKey, match="entry 1234 "):
        fill_whole(whole, [(0, torch.from_numpy(keys))], tmp_path / "whole")
    assert not any((tmp_path / name).exists() for name in ("other", "part", "whole"))


def test_large_finite_keys_are_taken(tmp_path: Path) -> None:
    keys = np.full((20, DIMENSION), 3e38, np.float32)
    fill_whole(trained("Flat", tmp_path / "trained"), [(0, torch.from_numpy(keys))], tmp_path / "index")
    assert read_index_facts(tmp_path / "index").entries == 20


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk on which no file grows beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_the_disk_does_not_take_is_an_error_and_never_half_an_index(tmp_path: Path) -> None:
    """FAISS's own writer prints a line and goes on."""
    keys = clustered(20_000)
    index, whole = trained("IVF12,SQ8", tmp_path / "trained", keys), trained("Flat", tmp_path / "flat", keys)
    made = part(index, keys, 0, len(keys), tmp_path / "made")
    with files_of_at_most(700), pytest.raises(OSError, match="File too large"):
        trained("IVF12,SQ8", tmp_path / "other", keys)
    with files_of_at_most(100_000):
        with pytest.raises(OSError, match="File too large"):
            part(index, keys, 0, len(keys), tmp_path / "part")
        with pytest.raises(OSError, match="File too large"):
            fill_whole(whole, [(0, torch.from_numpy(keys))], tmp_path / "whole")
        with pytest.raises(OSError, match="File too large"):
            merge_parts(index, [made], tmp_path / "index")
    assert not any((tmp_path / name).exists() for name in ("other", "part", "whole", "index"))
    assert merge_parts(index, [part(index, keys, 0, len(keys), tmp_path / "part")], tmp_path / "index").entries == len(keys)


@pytest.mark.parametrize("factory", ["IDMap,Flat", "IVF12,Flat,RFlat"])
def test_an_index_that_takes_no_entries_by_number_is_named(tmp_path: Path, factory: str) -> None:
    with pytest.raises(IndexingError, match=factory):
        built(ShardedRows([clustered()], [0]), factory, tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("factory", ["IVF12,Flat", "IVF12,SQ8", "IVF12,PQ8x8np", "PCAR8,IVF12,SQ8"])
def test_a_gpu_trains_and_fills_nearly_the_same_index(tmp_path: Path, factory: str) -> None:
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("needs a FAISS with GPU support")
    keys = clustered(MANY, WIDE)
    found = []
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        train(factory, WIDE, keys, MANY, folder / "trained", device)
        fill_part(folder / "trained", [(0, torch.from_numpy(keys))], folder / "part", device)
        merge_parts(folder / "trained", [folder / "part"], folder / "index")
        index = faiss.read_index(str(folder / "index" / INDEX_FILE))
        faiss.extract_index_ivf(index).nprobe = 12
        found.append(index.search(keys[:100], 20)[1])
    assert np.mean([len(set(one) & set(other)) / 20 for one, other in zip(*found, strict=True)]) > 0.95
