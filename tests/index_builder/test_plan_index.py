"""What an index will take, and what is refused before anything runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput, KNNLMError
from knnlm.index import EXACT, INDEX_FILE
from knnlm_index_builder.plan_index import plan_index
from knnlm_index_builder.train_index import choose_factory, training_points
from tests.indexes import DIMENSION, ENTRIES, MERGEABLE, WHOLE, built, clustered, rows_of

GIB = 1 << 30


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


def test_too_few_keys_to_train_codes_with_is_said(tmp_path: Path) -> None:
    with pytest.raises(KNNLMError, match="PQ4x8np"):
        built(rows_of(clustered(60)), "PQ4x8np", tmp_path)


def test_more_cells_than_entries_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"100 cells.*60 entries"):
        built(rows_of(clustered(60)), "IVF100,SQ8", tmp_path)


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
        (100_000_000, 768, True, "IVF65536,PQ96x8np"),
        (100_000_001, 768, False, "OPQ64_256,IVF262144_HNSW32,PQ64x8np"),
        (100_000_001, 768, True, "OPQ64_256,IVF262144,PQ64x8np"),
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


@pytest.mark.parametrize("entries", [1, 10, 39, 500, 60_000, 2_000_000, 20_000_000])
@pytest.mark.parametrize("dimension", [20, 1030])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("keys_stored", [True, False])
def test_every_automatic_choice_can_be_built(entries: int, dimension: int, device: str, keys_stored: bool) -> None:
    factory = choose_factory(entries, dimension, gpu=device != "cpu", keys_stored=keys_stored)
    plan = plan_index(factory, dimension, entries, device=device, keys_stored=keys_stored)
    assert plan.mergeable or (keys_stored and factory == "Flat")


@pytest.mark.parametrize("factory", MERGEABLE + WHOLE)
def test_the_plan_knows_how_it_is_filled_and_what_it_takes_on_disk(tmp_path: Path, factory: str) -> None:
    plan = plan_index(factory, DIMENSION, ENTRIES)
    assert plan.mergeable == (factory in MERGEABLE)
    size = (built(rows_of(clustered()), factory, tmp_path) / INDEX_FILE).stat().st_size
    # Code tables and headers come on top; at real sizes they are nothing.
    assert 0.9 * plan.disk_bytes < size < plan.disk_bytes + 40_000


def test_exact_search_takes_nothing() -> None:
    plan = plan_index(EXACT, 16, 1000, memory=1)
    assert (plan.training_points, plan.training_bytes, plan.filling_bytes, plan.disk_bytes) == (0, 0, 0, 0)


@given(nlist=st.integers(0, 5000), entries=st.integers(1, 10**6), most=st.none() | st.integers(0, 10**6))
def test_the_training_sample_is_between_39_and_64_keys_a_cell(nlist: int, entries: int, most: int | None) -> None:
    points = training_points(nlist, entries, most)
    least, wanted = (min(entries, max(per_cell * nlist, 20_000)) for per_cell in (39, 64))
    assert least <= points <= wanted
    assert points == wanted if most is None else points in (least, most, wanted)


def test_memory_cuts_the_sample_down_to_39_keys_a_cell_and_no_further() -> None:
    def planned(memory: int | None) -> int:
        return plan_index("IVF4096,SQ8", 1024, 10**7, memory=memory, part_entries=10**5).training_points

    assert planned(None) == planned(8 * GIB) == 64 * 4096
    some = planned(2 * GIB)
    assert 39 * 4096 < some < 64 * 4096
    assert plan_index("IVF4096,SQ8", 1024, 10**7, memory=2 * GIB, part_entries=10**5).training_bytes <= 2 * GIB
    with pytest.raises(InvalidInput, match=rf"training 'IVF4096,SQ8' takes up to \d+ bytes.*{GIB} are allowed"):
        planned(GIB)


def test_an_index_that_is_filled_whole_must_fit_into_memory() -> None:
    with pytest.raises(InvalidInput, match=r"filling 'Flat'"):
        plan_index("Flat", 1024, 10**6, memory=4 * GIB)
    assert plan_index("Flat", 1024, 10**5, memory=4 * GIB).filling_bytes > 4 * 1024 * 10**5
    assert plan_index("IVF1000,Flat", 1024, 10**6, memory=4 * GIB, part_entries=10**5).mergeable


@pytest.mark.parametrize("factory", [EXACT, "Flat", "SQ8", "IVF12,Flat", "IVF12,PQ8x4fs", "HNSW16", "PCAR8,IVF12,Flat"])
def test_without_stored_keys_only_codes_in_merged_lists_will_do(factory: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(repr(factory))) as refused:
        plan_index(factory, DIMENSION, ENTRIES, keys_stored=False)
    assert refused.value.field == "index"


@pytest.mark.parametrize("factory", ["IVF12,SQ8", "IVF12,RaBitQ", "OPQ8_8,IVF12,PQ8x8np"])
def test_without_stored_keys_codes_will_do(factory: str) -> None:
    assert plan_index(factory, DIMENSION, ENTRIES, keys_stored=False).mergeable


@pytest.mark.parametrize("factory", ["IVF12,RaBitQ", "IVF12,PQ8x4fs", "IVF12_HNSW8,SQ8", "HNSW16", "SQ8", "IVF12,PQ8x6np"])
def test_what_a_gpu_cannot_do_is_refused_by_name(factory: str) -> None:
    with pytest.raises(InvalidInput, match=rf"{re.escape(repr(factory))}.*GPU"):
        plan_index(factory, DIMENSION, ENTRIES, device="cuda")


def test_codes_of_a_size_that_no_gpu_has_are_refused_with_the_sizes() -> None:
    with pytest.raises(InvalidInput, match=r"1, 2, 3, 4, 8, .*96 parts, not 8 and 5"):
        plan_index("IVF12,PQ5x8np", 20, ENTRIES, device="cuda")


@pytest.mark.parametrize("factory", ["Flat", EXACT, "IVF12,Flat", "IVF12,SQ8", "IVF12,PQ8x8np", "PCAR8,IVF12,PQ8x8np"])
def test_what_a_gpu_can_do_is_planned(factory: str) -> None:
    assert plan_index(factory, DIMENSION, ENTRIES, device="cuda").factory == factory


def test_an_index_that_keeps_equal_keys_once_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"FlatDedup.*equal keys once"):
        plan_index("IVF12,FlatDedup", DIMENSION, ENTRIES)


PEAK = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from knnlm_index_builder.fill_index import fill_part
from knnlm_index_builder.train_index import new_index, train

factory, dimension, points, entries, folder = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5])
new_index(factory, dimension)
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
chance = np.random.default_rng(0)
train(factory, dimension, chance.random((points, dimension), np.float32), points, folder / "trained")
trained = peak() - before
pieces = ((start, torch.rand(1000, dimension)) for start in range(0, entries, 1000))
fill_part(folder / "trained", pieces, folder / "part")
print(trained, peak() - before)
"""


@pytest.mark.parametrize("factory", ["IVF64,PQ16x8np", "PCAR64,IVF64,RaBitQ"])
def test_training_and_filling_take_no_more_memory_than_planned(tmp_path: Path, factory: str) -> None:
    dimension, points, entries = 256, 60_000, 100_000
    plan = plan_index(factory, dimension, entries)
    said = plan.training_bytes + (points - plan.training_points) * 4 * dimension * (2 if "PCA" not in factory else 3)
    line = [sys.executable, "-c", PEAK, factory, *map(str, (dimension, points, entries)), str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=True)
    training, both = map(int, done.stdout.split())
    assert training < said
    assert both < max(said, plan.filling_bytes)
