"""From neighbours to p_kNN: a distribution, whatever the neighbours, equal to NumPy's in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.distribution import knn_log_probs, knn_token_log_probs, log_weights
from knnlm.neighbors import Neighbors
from tests import reference

VOCABULARY = 7


def row(distances: list[float], tokens: list[int], missing: int = 0) -> Neighbors:
    """One row of neighbours with ``missing`` empty places at its end."""
    d = torch.tensor([distances + [math.inf] * missing], dtype=torch.float32).reshape(1, -1)
    t = torch.tensor([tokens + [0] * missing], dtype=torch.int64).reshape(1, -1)
    i = torch.tensor([list(range(len(tokens))) + [-1] * missing], dtype=torch.int64).reshape(1, -1)
    return Neighbors(d, t, i)


PAIRS = st.lists(st.tuples(st.floats(0, 1e4, width=32), st.integers(0, VOCABULARY - 1)), min_size=1, max_size=12)
TEMPERATURES = st.floats(0.01, 1e4)


def neighbors_of(pairs: list[tuple[float, int]], missing: int = 0) -> Neighbors:
    return row([d for d, _ in pairs], [t for _, t in pairs], missing)


@given(PAIRS, TEMPERATURES, st.integers(0, 3))
def test_sums_to_one_with_any_number_of_empty_places(pairs: list[tuple[float, int]], temperature: float, missing: int) -> None:
    log_probs = knn_log_probs(neighbors_of(pairs, missing), temperature, VOCABULARY)
    assert log_probs.shape == (1, VOCABULARY)
    assert log_probs.dtype == torch.float32
    assert log_probs.exp().sum().item() == pytest.approx(1, abs=1e-5)


@given(PAIRS, TEMPERATURES, st.integers(0, 3))
def test_equals_numpy_in_float64(pairs: list[tuple[float, int]], temperature: float, missing: int) -> None:
    distances, tokens = np.array([d for d, _ in pairs]), np.array([t for _, t in pairs])
    expected = reference.knn_probabilities(distances, tokens, temperature, VOCABULARY)
    found = knn_log_probs(neighbors_of(pairs, missing), temperature, VOCABULARY)[0].double().exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-30)


@given(PAIRS, TEMPERATURES, st.randoms(use_true_random=False))
def test_order_of_neighbours_makes_no_difference(pairs: list[tuple[float, int]], temperature: float, chance: object) -> None:
    shuffled = list(pairs)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (knn_log_probs(neighbors_of(p), temperature, VOCABULARY) for p in (pairs, shuffled))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@given(PAIRS, TEMPERATURES, st.integers(0, 3))
def test_one_token_is_the_gather_of_the_dense_form(pairs: list[tuple[float, int]], temperature: float, missing: int) -> None:
    neighbors = neighbors_of(pairs, missing)
    dense = knn_log_probs(neighbors, temperature, VOCABULARY)[0]
    for token in range(VOCABULARY):
        torch.testing.assert_close(
            knn_token_log_probs(neighbors, temperature, torch.tensor([token]))[0], dense[token], rtol=1e-6, atol=1e-6
        )


def test_neighbours_with_the_same_token_add_up() -> None:
    log_probs = knn_log_probs(row([1.0, 1.0, 1.0, 1.0], [2, 5, 2, 2]), 3.0, VOCABULARY)
    assert log_probs[0, 2].exp().item() == pytest.approx(0.75)
    assert log_probs[0, 5].exp().item() == pytest.approx(0.25)


def test_nearer_is_likelier_by_exp_of_the_difference_over_temperature() -> None:
    log_probs = knn_log_probs(row([2.0, 8.0], [1, 3]), 4.0, VOCABULARY)[0]
    assert (log_probs[1] - log_probs[3]).item() == pytest.approx(6 / 4)


def test_empty_places_get_no_weight_and_give_token_0_none() -> None:
    neighbors = row([1.0], [4], missing=3)
    assert log_weights(neighbors, 1.0).exp().tolist() == [[1, 0, 0, 0]]
    log_probs = knn_log_probs(neighbors, 1.0, VOCABULARY)[0]
    assert log_probs[4] == 0
    assert log_probs[0] == -math.inf
    assert knn_token_log_probs(neighbors, 1.0, torch.tensor([0]))[0] == -math.inf


def test_token_0_as_a_real_value_keeps_its_weight_beside_empty_places() -> None:
    assert knn_log_probs(row([1.0, 1.0], [0, 4], missing=2), 1.0, VOCABULARY)[0, 0].exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("width", [0, 1, 4])
def test_a_row_without_neighbours_is_impossible_everywhere_and_not_nan(width: int) -> None:
    nobody = Neighbors.empty(2, width)
    assert knn_log_probs(nobody, 1.0, VOCABULARY).tolist() == [[-math.inf] * VOCABULARY] * 2
    assert knn_token_log_probs(nobody, 1.0, torch.tensor([0, 3])).tolist() == [-math.inf] * 2


def test_far_neighbours_keep_finite_log_probabilities() -> None:
    log_probs = knn_log_probs(row([0.0, 5e5], [1, 2]), 1.0, VOCABULARY)[0]
    assert log_probs[1] == 0
    assert log_probs[2].item() == pytest.approx(-5e5)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-3, 1e300])
def test_no_distance_and_no_temperature_overflows(temperature: float) -> None:
    log_probs = knn_log_probs(row([3e38, 3e38, 3.1e38], [1, 2, 3]), temperature, VOCABULARY)[0]
    assert log_probs[1].exp().item() == pytest.approx(0.5 if temperature < 1 else 1 / 3)
    assert log_probs.exp().sum().item() == pytest.approx(1)


def test_an_empty_place_between_neighbours_is_left_out_too() -> None:
    holed = row([1.0, 1.0, 1.0], [1, 2, 3])
    holed.ids[0, 0] = -1
    assert knn_log_probs(holed, 1.0, VOCABULARY)[0].exp().tolist() == pytest.approx([0, 0, 0.5, 0.5, 0, 0, 0])


def test_each_row_has_its_own_temperature() -> None:
    both = Neighbors(*(torch.cat([t, t]) for t in (lambda n: (n.distances, n.tokens, n.ids))(row([1.0, 3.0], [1, 2]))))
    found = knn_log_probs(both, torch.tensor([0.5, 50.0]), VOCABULARY)
    for index, temperature in enumerate((0.5, 50.0)):
        torch.testing.assert_close(found[index], knn_log_probs(row([1.0, 3.0], [1, 2]), temperature, VOCABULARY)[0])


def test_row_and_nearest_of_neighbours() -> None:
    neighbors = row([1.0, 2.0, 3.0], [4, 5, 6], missing=2)
    assert len(neighbors) == 1
    assert neighbors.row(0).ids.tolist() == [[0, 1, 2]]
    assert neighbors.nearest(2).tokens.tolist() == [[4, 5]]
    assert neighbors.found.tolist() == [[True, True, True, False, False]]
