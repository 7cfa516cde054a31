"""Which settings are chosen: the cheapest on the curve that meets the target, the same on every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace

import faiss
import numpy as np
import pytest
import torch

from knnlm.entry_mask import EntryMask
from knnlm.index import ExactIndex
from knnlm.retrieval import Retriever
from knnlm.search_measurement import Searched, SearchMeasurement
from knnlm.search_settings import SearchSettings, SearchTuning
from knnlm.search_tuning import TARGET, tune
from tests.searching import ENTRIES, VOCABULARY, clustered_keys, exact_distribution, positions_at, searched

TEMPERATURE = 4.0
KS = (4, 16, 64)
AT = np.arange(3, ENTRIES, 29)
EVERY_KIND = ["IVF20,SQ8", "IVF20,PQ8x6np", "IVF100,Flat", "IVF30,RaBitQ", "PQ8x6np", "SQ8", "HNSW16"]


def tuning(factory: str, *, stored: bool = True, target: float = TARGET, allowed: EntryMask | None = None) -> SearchTuning:
    keys = clustered_keys()
    parts = searched(factory, keys, stored=stored, allowed=allowed)
    return tune(parts, positions_at(keys, AT), KS, temperature=TEMPERATURE, target=target)


@pytest.mark.parametrize("factory", EVERY_KIND)
def test_nothing_cheaper_on_the_curve_meets_the_target(factory: str) -> None:
    found = tuning(factory)
    assert [setting.k for setting in found.settings] == list(KS)
    assert len({(p.k, p.probes, p.overfetch) for p in found.curve}) == len(found.curve)
    assert found.curve == sorted(found.curve, key=lambda p: (p.k, p.probes, p.overfetch))
    for setting in found.settings:
        chosen = found.point(setting)
        points = [point for point in found.curve if point.k == setting.k]
        within = [point for point in points if point.total_variation + point.standard_error <= TARGET]
        if within:
            assert chosen in within
            assert chosen.bytes_read == min(point.bytes_read for point in within)
        else:
            assert chosen.total_variation == min(point.total_variation for point in points)
    assert found.met == all(found.point(setting).total_variation <= TARGET for setting in found.settings)


@pytest.mark.parametrize("factory", ["IVF20,SQ8", "IVF20,PQ8x6np", "IVF100,Flat"])
def test_the_settings_meet_the_target_by_brute_force(factory: str) -> None:
    """Served through the product with the tuned settings, in float64 NumPy, without the own document."""
    keys = clustered_keys()
    parts, positions = searched(factory, keys), positions_at(keys, AT)
    found = tune(parts, positions, KS, temperature=TEMPERATURE)
    assert found.met
    for k in KS:
        variations = []
        for row, (start, stop) in enumerate(positions.left_out.tolist()):
            mask = EntryMask.without(len(keys), [(start, stop)])
            settings = replace(SearchSettings.tuned(found), entries=mask.allowed)
            got = Retriever(
                parts.index, parts.keys, parts.values, settings, lambda mask=mask: mask
            ).retrieve(  # type: ignore[misc]
                positions.queries[row : row + 1], k
            )
            mine = np.zeros(VOCABULARY)
            weights = torch.softmax(-got.distances[0].double() / TEMPERATURE, 0).numpy()
            np.add.at(mine, got.tokens[0].numpy(), weights)
            kept = mask.allows(torch.arange(len(keys))).nonzero()[:, 0].numpy()
            variations.append(np.abs(mine - exact_distribution(keys, positions.queries[row].numpy(), kept, k, TEMPERATURE)[0]).sum() / 2)
        assert np.mean(variations) <= TARGET


def test_a_stricter_target_costs_more_and_an_impossible_one_is_said() -> None:
    loose, strict = tuning("IVF20,PQ8x6np", target=0.05), tuning("IVF20,PQ8x6np", target=0.001)
    costs = [[found.point(setting).bytes_read for setting in found.settings] for found in (loose, strict)]
    assert all(cheap < dear for cheap, dear in zip(*costs, strict=True))
    hopeless = tuning("IVF20,PQ2x4np", target=1e-6)
    assert not hopeless.met
    for setting in hopeless.settings:
        assert hopeless.point(setting).total_variation == min(p.total_variation for p in hopeless.curve if p.k == setting.k)


def test_few_neighbours_from_coarse_codes_are_given_more_candidates_than_many() -> None:
    few, _, many = tuning("IVF20,PQ8x6np").settings
    assert few.overfetch > many.overfetch


@pytest.mark.parametrize("kind", ["Flat", "exact"])
def test_an_index_that_compares_every_key_leaves_nothing_to_choose(kind: str) -> None:
    keys = clustered_keys()
    parts = searched("Flat", keys)
    if kind == "exact":
        assert parts.keys is not None
        parts = Searched(ExactIndex(parts.keys), parts.keys, parts.values, None, 0, VOCABULARY)
    found = tune(parts, positions_at(keys, AT), KS)
    assert (found.met, found.settings, found.curve, found.queries) == (True, [], [], 0)
    assert "nothing to choose" in found.source
    assert SearchSettings.tuned(found).for_k(64) == SearchSettings(0, ENTRIES).for_k(64)


def test_without_stored_keys_only_probes_are_chosen() -> None:
    found = tuning("IVF20,PQ8x6np", stored=False)
    assert found.distance == "index"
    assert "the index's own search of all its cells" in found.source
    assert found.met
    assert {point.overfetch for point in found.curve} == {1.0}
    assert all(1 <= setting.probes < 20 for setting in found.settings)


def test_removed_entries_are_counted_out_and_change_what_is_found() -> None:
    allowed = EntryMask.without(ENTRIES, [(500, 1500)])
    at = np.array([entry for entry in AT if not 500 <= entry < 1500])
    keys = clustered_keys()
    found = tune(searched("IVF20,SQ8", keys, allowed=allowed), positions_at(keys, at), KS, temperature=TEMPERATURE)
    assert (found.entries, found.met, found.queries) == (1000, True, len(at))
    settings = SearchSettings.tuned(found)
    assert [settings.for_k(k, 1000) for k in KS] == found.settings
    assert all(settings.for_k(k, 250).probes == min(20, 4 * setting.probes) for k, setting in zip(KS, found.settings, strict=True))


@pytest.mark.parametrize("entries", [50, 51, 60])
def test_a_store_of_hardly_any_entries_is_no_error(entries: int) -> None:
    keys = clustered_keys(entries)
    found = tune(searched("IVF2,SQ8", keys), positions_at(keys, np.arange(0, entries, 7)), KS)
    if entries == 50:
        assert (found.met, found.settings) == (True, [])
        assert "too few entries" in found.source
    else:
        assert [setting.k for setting in found.settings] == sorted({min(k, entries - 50) for k in KS})


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.mark.parametrize("factory", EVERY_KIND[:-1])
@pytest.mark.usefixtures("two_threads")
def test_two_threads_choose_what_one_does(factory: str) -> None:
    keys = clustered_keys()
    parts, positions = searched(factory, keys), positions_at(keys, AT)
    two = tune(parts, positions, KS, temperature=TEMPERATURE)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    assert asdict(tune(parts, positions, KS, temperature=TEMPERATURE)) == asdict(two)


def test_positions_decide_not_their_order() -> None:
    keys = clustered_keys()
    parts = searched("IVF20,SQ8", keys)
    one = SearchMeasurement(parts, positions_at(keys, AT), KS, TEMPERATURE).at(4, 64)(16, 2.0)
    other = SearchMeasurement(parts, positions_at(keys, AT[::-1].copy()), KS, TEMPERATURE).at(4, 64)(16, 2.0)
    assert one == other
