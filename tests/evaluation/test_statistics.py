"""Standard errors, bootstrap intervals and clusters, against explicit loops."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.evaluation import statistics
from knnlm.evaluation.statistics import Clusters, intervals_of_means, perplexity, relative, resampled_means, standard_error


def made(of: npt.NDArray[np.int64]) -> Clusters:
    return Clusters(of, int(of.max()) + 1, "clusters")


def clustered(seed: int, sizes: list[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Values that share a part within a cluster, as losses of one text do."""
    chance = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    values = chance.normal(-3, 1, len(clusters)) + chance.normal(0, 1, len(sizes))[clusters]
    return values.astype(np.float32), clusters


def test_standard_error_of_equal_clusters_is_that_of_their_means() -> None:
    values, clusters = clustered(0, [7] * 40)
    means = values.astype(np.float64).reshape(40, 7).mean(1)
    assert standard_error(values, made(clusters)) == pytest.approx(means.std(ddof=1) / math.sqrt(40), rel=1e-6)


def test_standard_error_of_single_tokens_is_the_textbook_one() -> None:
    values, _ = clustered(1, [1] * 300)
    assert standard_error(values, made(np.arange(300))) == pytest.approx(values.astype(np.float64).std(ddof=1) / math.sqrt(300), rel=1e-6)


@pytest.mark.parametrize("seed", [2, 3])
def test_standard_error_is_near_the_bootstrap_over_clusters(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 60, 120).tolist()
    values, clusters = clustered(seed, sizes)
    sums, counts = np.bincount(clusters, values), np.bincount(clusters)
    draws = np.random.default_rng(9).integers(0, len(sizes), (4000, len(sizes)))
    bootstrap = (sums[draws].sum(1) / counts[draws].sum(1)).std()
    assert standard_error(values, made(clusters)) == pytest.approx(bootstrap, rel=0.08)
    as_if_independent = values.std() / math.sqrt(len(values))
    assert bootstrap > 2 * as_if_independent


def test_standard_error_of_one_cluster_or_infinite_values_is_not_known() -> None:
    assert math.isnan(standard_error(np.array([1, 2], np.float32), made(np.zeros(2, np.int64))))
    assert math.isnan(standard_error(np.array([1, -np.inf], np.float32), made(np.arange(2))))


SUMS = st.integers(2, 7).flatmap(lambda count: st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 3)), min_size=count, max_size=count))


@given(SUMS, st.integers(1, 20), st.integers(0, 3), st.integers(1, 40))
def test_resampled_means_equal_a_loop_over_the_same_draws(clusters: list[tuple[int, int]], resamples: int, seed: int, at_once: int) -> None:
    sums, sizes = (np.array(column, np.float64)[:, None] for column in zip(*clusters, strict=True))
    draws = np.random.default_rng(seed).integers(0, len(clusters), (resamples, len(clusters)))
    expected = []
    for row in draws.tolist():
        total, size = sum(clusters[c][0] for c in row), sum(clusters[c][1] for c in row)
        expected.append(total / size if size else math.nan)
    with patch.object(statistics, "DRAWS_AT_ONCE", at_once):
        found = resampled_means(sums, sizes, resamples=resamples, seed=seed)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-12)


def test_intervals_are_percentiles_of_what_each_draw_gives_token_by_token() -> None:
    values, of = clustered(4, np.random.default_rng(4).integers(1, 30, 25).tolist())
    member = np.random.default_rng(5).random(len(values)) < 0.2
    draws = np.random.default_rng(11).integers(0, 25, (300, 25))
    whole, part = [], []
    for row in draws.tolist():
        drawn = np.concatenate([np.flatnonzero(of == cluster) for cluster in row])
        whole.append(values[drawn].mean(dtype=np.float64))
        part.append(values[drawn][member[drawn]].mean(dtype=np.float64))
    for found, means in zip(intervals_of_means(values, made(of), [member], resamples=300, seed=11), (whole, part), strict=True):
        assert (found.low, found.high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)), rel=1e-9)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_interval_is_about_two_standard_errors_wide_to_each_side(seed: int) -> None:
    values, of = clustered(seed, np.random.default_rng(seed).integers(5, 40, 150).tolist())
    error, mean = standard_error(values, made(of)), values.mean(dtype=np.float64)
    interval = intervals_of_means(values, made(of))[0]
    assert interval.holds(mean)
    assert (mean - interval.low, interval.high - mean) == pytest.approx((1.96 * error, 1.96 * error), rel=0.15)


def test_intervals_hold_the_true_mean_about_as_often_as_they_say() -> None:
    """Of 200 texts of 60 correlated documents, 95 % and no fewer than chance allows; intervals over tokens alone hold far fewer."""
    held = alone = 0
    for seed in range(200):
        values, of = clustered(1000 + seed, [20] * 60)
        held += intervals_of_means(values, made(of), resamples=400)[0].holds(-3)
        alone += intervals_of_means(values, made(np.arange(len(values))), resamples=100)[0].holds(-3)
    assert 180 <= held <= 199
    assert alone < 140


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_cannot_be_known_spoils_only_its_own_group(bad: float) -> None:
    values = np.array([1, 2, 3, bad], np.float32)
    clean = np.array([True, True, True, False])
    whole, part, rest = intervals_of_means(values, made(np.arange(4)), [clean, ~clean])
    assert math.isnan(whole.low)
    assert math.isnan(rest.high)
    assert 1 <= part.low <= part.high <= 3


def test_tokens_of_one_cluster_or_no_tokens_have_no_interval() -> None:
    alone = intervals_of_means(np.array([1.0, 2.0, 3.0]), made(np.array([0, 0, 1])), [np.array([True, True, False])])[1]
    assert math.isnan(alone.low)
    assert math.isnan(intervals_of_means(np.array([1.0, 2.0]), made(np.zeros(2, np.int64)))[0].low)
    assert math.isnan(intervals_of_means(np.array([1.0, 2.0]), made(np.arange(2)), [np.zeros(2, bool)])[1].low)


def test_a_gain_in_nats_is_a_fall_of_perplexity() -> None:
    low_gain, high_gain = math.log(1.1), math.log(2.0)
    interval = relative(statistics.Interval(low_gain, high_gain))
    assert (interval.low, interval.high) == pytest.approx((1 / 2 - 1, 1 / 1.1 - 1))


def test_perplexity_of_the_impossible_is_infinite() -> None:
    assert perplexity(np.array([0.0, -np.inf], np.float32)) == math.inf
    assert perplexity(np.log(np.array([0.5, 0.125]))) == pytest.approx(4)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=30))
def test_clusters_are_documents_or_their_blocks(lengths: list[int]) -> None:
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(1, n + 1) for n in lengths])
    clusters = Clusters.among(document, position)
    names: list[Any] = document.tolist()
    if len(lengths) < 20:
        names = list(zip(document.tolist(), (position // 256).tolist(), strict=True))
    assert clusters.count == len(set(names))
    assert len(set(zip(names, clusters.of.tolist(), strict=True))) == clusters.count
    np.testing.assert_array_equal(clusters.sums(np.ones(len(names))), np.bincount(clusters.of))
