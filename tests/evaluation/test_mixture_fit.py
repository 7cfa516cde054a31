"""The fitted mixture against brute force over a made-up cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.evaluation.mixture_fit import (
    best_weight,
    fit_mixture,
    mixed_log_probs,
    mixture_loss,
    powers_of_two,
    target_log_probs,
    temperature_grid,
)
from knnlm.evaluation.neighbor_cache import CachedTokens, NeighborCache

VOCABULARY = 6


def made_up(n: int, k: int, seed: int, helpful: float = 0.5) -> CachedTokens:
    """Tokens of which a share ``helpful`` have near neighbours that know them; some rows have few neighbours or none."""
    random = np.random.default_rng(seed)
    part = CachedTokens.empty(n, k)
    part.target[:] = random.integers(0, VOCABULARY, n)
    part.lm_log_prob[:] = np.log(random.uniform(0.05, 0.6, n))
    part.distances[:] = np.sort(random.uniform(1, 40, (n, k)), axis=1)
    part.tokens[:] = random.integers(0, VOCABULARY, (n, k))
    known = random.random(n) < helpful
    part.tokens[known, : max(1, k // 3)] = part.target[known, None]
    part.ids[:] = random.integers(0, 1000, (n, k))
    counts = np.where(random.random(n) < 0.2, random.integers(0, k + 1, n), k)
    nothing = np.arange(k) >= counts[:, None]
    part.ids[nothing], part.distances[nothing], part.tokens[nothing] = -1, np.inf, 0
    return part


class MadeUp(NeighborCache):
    """Parts that lie in memory."""

    def __init__(self, *parts: CachedTokens) -> None:
        super().__init__(Path("nowhere"), {"k": parts[0].distances.shape[1], "tokens": sum(map(len, parts)), "parts": len(parts)})
        self._made = parts

    def parts(self) -> Iterator[CachedTokens]:
        yield from self._made


def slow_target_log_prob(part: CachedTokens, row: int, k: int, temperature: float) -> float:
    votes = [
        (-float(part.distances[row, place]) / temperature, part.tokens[row, place] == part.target[row])
        for place in range(k)
        if part.ids[row, place] >= 0
    ]
    if not votes:
        return math.nan
    total = np.logaddexp.reduce([score for score, _ in votes])
    return float(np.logaddexp.reduce([score for score, same in votes if same] or [-math.inf]) - total)


@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.3, 2.0, 10.0, 1e4]))
def test_log_probs_of_targets(seed: int, temperature: float) -> None:
    part, ks = made_up(15, 9, seed), [1, 2, 4, 9]
    found = target_log_probs(part, ks, temperature)
    slow = [[slow_target_log_prob(part, row, k, temperature) for row in range(len(part))] for k in ks]
    np.testing.assert_allclose(found, slow, rtol=1e-6, atol=1e-9)


@given(seed=st.integers(0, 1000), helpful=st.sampled_from([0.0, 0.2, 0.9]))
def test_no_weight_of_a_fine_grid_is_better(seed: int, helpful: float) -> None:
    part = made_up(40, 8, seed, helpful)
    lm, knn = np.asarray(part.lm_log_prob, np.float64), target_log_probs(part, [8], 5.0)[0]
    weight, loss = best_weight(lm, knn)
    assert 0 <= weight <= 1
    assert loss == mixture_loss(lm, knn, weight)
    assert loss <= min(mixture_loss(lm, knn, other) for other in np.linspace(0, 0.9999, 400)) + 1e-7


def test_neighbours_that_know_nothing_get_no_weight() -> None:
    lm = np.log(np.full(10, 0.5))
    assert best_weight(lm, np.full(10, -np.inf)) == (0.0, pytest.approx(math.log(2)))
    assert best_weight(lm, np.full(10, np.nan)) == (0.0, pytest.approx(math.log(2)))


def test_neighbours_that_know_all_get_all_but_nothing_is_infinite() -> None:
    weight, loss = best_weight(np.log(np.full(10, 0.5)), np.zeros(10))
    assert weight == pytest.approx(1, abs=2e-6)
    assert loss == pytest.approx(0, abs=1e-5)
    # A target that the LM finds all but impossible does not overflow.
    weight, loss = best_weight(np.array([-900.0, -1.0]), np.array([-0.1, -np.inf]))
    assert 0 < weight < 1
    assert math.isfinite(loss)


def test_weight_zero_and_no_neighbour_are_the_lm_bit_for_bit() -> None:
    lm, knn = np.array([-1.0, -2.0, -3.0]), np.array([-0.5, np.nan, -np.inf])
    np.testing.assert_array_equal(mixed_log_probs(lm, knn, 0.0), lm)
    mixed = mixed_log_probs(lm, knn, 0.25)
    assert mixed[1] == lm[1]
    np.testing.assert_allclose(mixed[[0, 2]], np.log(0.25 * np.exp(knn[[0, 2]]) + 0.75 * np.exp(lm[[0, 2]])))
    np.testing.assert_allclose(mixed_log_probs(lm, knn, np.array([0.25, 0.9, 0.0])), [mixed[0], lm[1], lm[2]])


def test_the_fit_is_as_good_as_brute_force() -> None:
    cache = MadeUp(made_up(150, 16, 1), made_up(90, 16, 2))
    fit = fit_mixture(cache)
    assert fit.mixture.k in powers_of_two(16)
    lm = np.concatenate([np.asarray(part.lm_log_prob, np.float64) for part in cache.parts()])
    assert fit.base_loss == pytest.approx(-lm.mean())

    def loss(k: int, temperature: float) -> float:
        knn = np.concatenate([target_log_probs(part, [k], temperature)[0] for part in cache.parts()])
        return min(mixture_loss(lm, knn, weight) for weight in np.linspace(0, 0.99, 100))

    least = min(loss(k, temperature) for k in range(1, 17) if k in powers_of_two(16) for temperature in np.geomspace(0.3, 300, 60))
    assert fit.loss <= least + 1e-4
    assert fit.loss == pytest.approx(min(point.loss for point in fit.surface), abs=1e-9)
    assert fit == fit_mixture(cache), "deterministic"


def test_parts_are_one_text() -> None:
    first, second = made_up(60, 8, 3), made_up(70, 8, 4)
    joined = CachedTokens(**{name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in vars(first)})
    apart, together = fit_mixture(MadeUp(first, second)), fit_mixture(MadeUp(joined))
    assert apart.mixture == together.mixture
    assert apart.loss == pytest.approx(together.loss)


@pytest.mark.parametrize(("most", "found"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (1024, [1 << place for place in range(11)])])
def test_powers_of_two(most: int, found: list[int]) -> None:
    assert powers_of_two(most) == found


def test_the_grid_follows_the_distances() -> None:
    part: Any = made_up(50, 8, 5)
    small, large = temperature_grid(MadeUp(part)), None
    part.distances[:] *= 1000
    large = temperature_grid(MadeUp(part))
    np.testing.assert_allclose(large, np.array(small) * 1000, rtol=1e-5)
    assert small == sorted(small)
