"""What is measured of a search setting equals brute force in NumPy, and what the product does with that setting."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.entry_mask import EntryMask
from knnlm.index import Candidates, ExactIndex, NeighborIndex
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.retrieval import Retriever
from knnlm.search_measurement import PAGE_BYTES, Searched, SearchMeasurement, recall, total_variation
from knnlm.search_positions import Positions
from knnlm.search_settings import SearchPoint, SearchSetting, SearchSettings
from tests import reference
from tests.searching import ENTRIES, INDEX_BYTES, VOCABULARY, Array, clustered_keys, exact_distribution, positions_at, searched

TEMPERATURE = 4.0
AT = np.arange(3, ENTRIES, 97)


def neighbors(ids: list[int], distances: list[float], width: int) -> Neighbors:
    """One row; the token of an entry is its number modulo 5."""
    missing = width - len(ids)
    return Neighbors(
        torch.tensor([[*distances, *[math.inf] * missing]], dtype=torch.float32),
        torch.tensor([[*(i % 5 for i in ids), *[0] * missing]]),
        torch.tensor([[*ids, *[-1] * missing]]),
    )


def variation(one: Array | None, other: Array | None) -> float:
    """Total variation of two distributions; None is none at all."""
    if one is None or other is None:
        return 0.0 if one is other else 1.0
    return float(np.abs(one - other).sum() / 2)


found = st.lists(st.tuples(st.integers(0, 30), st.floats(0, 50, width=32)), max_size=8, unique_by=lambda pair: pair[0])


@given(found, found, st.floats(0.1, 100))
def test_total_variation_and_recall_equal_numpy(one: list[tuple[int, float]], other: list[tuple[int, float]], temperature: float) -> None:
    rows, distributions = [], []
    for pairs in (one, other):
        pairs = sorted(pairs, key=lambda pair: (pair[1], pair[0]))
        ids, distances = [i for i, _ in pairs], [d for _, d in pairs]
        rows.append(neighbors(ids, distances, 8))
        tokens = np.array(ids, dtype=np.int64) % 5
        distributions.append(reference.knn_probabilities(np.array(distances), tokens, temperature, 5) if ids else None)
    first, second = distributions
    expected = variation(first, second)
    assert float(total_variation(rows[0], rows[1], temperature)) == pytest.approx(expected, abs=1e-6)
    wanted = {i for i, _ in other}
    assert float(recall(rows[0], rows[1])) == (len(wanted & {i for i, _ in one}) / len(wanted) if wanted else 1.0)


class Masked:
    """An index without some entries, so that the retriever knows of none that is left out, and looks no further for it."""

    def __init__(self, index: NeighborIndex, mask: EntryMask) -> None:
        self._index, self._mask = index, mask
        self.description, self.nlist, self.entries = index.description, index.nlist, index.entries

    def search(self, queries: torch.Tensor, k: int, count: int, *, probes: int, allowed: EntryMask | None = None) -> Candidates:
        assert allowed is None
        return self._index.search(queries, k, count, probes=probes, allowed=self._mask)


def slow_point(parts: Searched, keys: Array, positions: Positions, setting: SearchSetting) -> dict[str, float]:
    """A point by asking the product for each position alone, with a mask of its own, and comparing with brute force."""
    variations, recalls, changes = [], [], []
    for row, (start, stop) in enumerate(positions.left_out.tolist()):
        mask = (parts.allowed or EntryMask.without(len(keys), ())).without_range(start, stop)
        settings = SearchSettings.fixed(parts.index.nlist, mask.allowed, setting.probes, setting.overfetch)
        retriever = Retriever(Masked(parts.index, mask), parts.keys, parts.values, settings)
        got = retriever.retrieve(positions.queries[row : row + 1], setting.k).row(0)
        kept = mask.allows(torch.arange(len(keys))).nonzero()[:, 0].numpy()
        exact, ids = exact_distribution(keys, positions.queries[row].numpy(), kept, setting.k, TEMPERATURE)
        mine = None
        if len(got.ids[0]):
            mine = reference.knn_probabilities(got.distances[0].double().numpy(), got.tokens[0].numpy(), TEMPERATURE, VOCABULARY)
        variations.append(variation(mine, exact))
        recalls.append(len(ids & set(got.ids[0].tolist())) / len(ids))
        changes.append(loss(mine, int(positions.values[row])) - loss(exact, int(positions.values[row])))
    return {
        "total_variation": np.mean(variations),
        "standard_error": np.std(variations, ddof=1) / math.sqrt(len(variations)),
        "total_variation_p95": np.quantile(variations, 0.95),
        "total_variation_max": np.max(variations),
        "recall": np.mean(recalls),
        "cross_entropy_change": np.mean(changes),
    }


def loss(knn: Array | None, value: int) -> float:
    """Nats of ``value`` in a mixture with uniform tokens; without neighbours these are all there is."""
    weight = 0.0 if knn is None else Mixture().weight
    return -math.log(weight * (0.0 if knn is None else float(knn[value])) + (1 - weight) / VOCABULARY)


def assert_near(point: SearchPoint, expected: dict[str, float]) -> None:
    for name, value in expected.items():
        assert getattr(point, name) == pytest.approx(value, abs=2e-5), name


@pytest.mark.parametrize("factory", ["IVF20,PQ4x4np", "IVF20,SQ8", "PQ4x4np"])
@pytest.mark.parametrize("removed", [(), ((100, 700), (901, 1000))], ids=["whole", "with removals"])
def test_points_equal_the_product_asked_one_by_one_against_brute_force(factory: str, removed: tuple[tuple[int, int], ...]) -> None:
    keys = clustered_keys()
    allowed = EntryMask.without(len(keys), removed) if removed else None
    parts = searched(factory, keys, allowed=allowed)
    at = np.array([entry for entry in AT if not any(start <= entry < stop for start, stop in removed)])
    positions = positions_at(keys, at)
    measurement = SearchMeasurement(parts, positions, [5, 30], TEMPERATURE)
    probes = 3 if parts.index.nlist else 0
    point_at = measurement.at(probes, 75)
    for k, overfetch in ((5, 1.0), (5, 4.0), (5, 15.0), (30, 1.0), (30, 2.5)):
        point = point_at(k, overfetch)
        setting = SearchSetting(point.k, point.probes, point.overfetch)
        assert_near(point, slow_point(parts, keys, positions, setting))
        assert point.bytes_read == parts.bytes_read(setting)


def test_a_document_that_crowds_the_nearest_places_is_left_out_all_the_same() -> None:
    """Then a position is searched again with a mask of its own: its own document holds more than all candidates."""
    keys = clustered_keys()
    keys[:600] = keys[:1] + 1e-3 * keys[:600]
    parts, positions = searched("IVF20,SQ8", keys), positions_at(keys, np.array([5, 599, 601, 1999]), width=600)
    measurement = SearchMeasurement(parts, positions, [8], TEMPERATURE)
    for probes in (1, 4, 20):
        point = measurement.at(probes, 16)(8, 2.0)
        assert_near(point, slow_point(parts, keys, positions, SearchSetting(8, probes, 2.0)))
    assert point.total_variation < 0.01


def test_all_cells_and_enough_candidates_are_exact() -> None:
    keys = clustered_keys()
    for factory in ("IVF20,Flat", "IVF20,SQ8", "Flat"):
        measurement = SearchMeasurement(searched(factory, keys), positions_at(keys, AT), [4, 64], TEMPERATURE)
        point_at = measurement.at(20 if factory != "Flat" else 0, 256)
        for point in (point_at(4, 4.0), point_at(64, 4.0)):
            assert (point.total_variation, point.recall, point.cross_entropy_change) == (0.0, 1.0, 0.0)


def test_without_stored_keys_the_reference_is_the_index_itself() -> None:
    keys = clustered_keys()
    parts, positions = searched("IVF20,PQ4x4np", keys, stored=False), positions_at(keys, AT)
    assert parts.distance == "index"
    measurement = SearchMeasurement(parts, positions, [10], TEMPERATURE)
    assert "index's own" in measurement.reference
    few, every = (measurement.at(probes, 10)(10, 1.0) for probes in (1, 20))
    assert few.total_variation > 0.05
    assert (every.total_variation, every.recall) == (0.0, 1.0)
    assert every.bytes_read == INDEX_BYTES


def test_an_index_that_compares_every_key_is_measured_too() -> None:
    keys = clustered_keys()
    parts = searched("Flat", keys)
    assert parts.keys is not None
    exact = Searched(ExactIndex(parts.keys), parts.keys, parts.values, None, 0, VOCABULARY)
    point = SearchMeasurement(exact, positions_at(keys, AT), [7], TEMPERATURE).at(0, 14)(7, 2.0)
    assert point.total_variation == 0.0


@pytest.mark.parametrize(("entries", "expected"), [(ENTRIES, [16, 64, 1024]), (200, [16, 64, 150]), (60, [10]), (50, [])])
def test_k_is_capped_at_what_a_position_may_find(entries: int, expected: list[int]) -> None:
    keys = clustered_keys(entries)
    measurement = SearchMeasurement(searched("Flat", keys), positions_at(keys, np.arange(1, entries, 20)), [16, 64, 1024], TEMPERATURE)
    assert measurement.ks == expected


@pytest.mark.parametrize("factory", ["IVF20,SQ8", "PQ4x4np"])
def test_bytes_read_are_cells_and_whole_pages_of_keys(factory: str) -> None:
    parts = searched(factory, clustered_keys())
    share = 1 if factory == "PQ4x4np" else 5 / 20
    assert parts.bytes_read(SearchSetting(10, 5, 1.55)) == round(INDEX_BYTES * share) + 16 * PAGE_BYTES
    assert parts.bytes_read(SearchSetting(ENTRIES, 5, 4.0)) == round(INDEX_BYTES * share) + ENTRIES * PAGE_BYTES
