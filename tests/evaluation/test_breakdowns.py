"""Groups of tokens, against loops over single tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.reader import ShardedRows
from knnlm.evaluation.breakdowns import (
    Part,
    Scores,
    distance_parts,
    frequency_parts,
    gain_of,
    groups,
    occurrence_parts,
    token_counts,
)
from knnlm.evaluation.statistics import Clusters

DOCUMENTS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=12), min_size=1, max_size=6)


def names(parts: list[Part], n: int) -> list[str]:
    """The part of each token; every token is in exactly one."""
    assert sum(part.members.astype(int) for part in parts).tolist() == [1] * n
    return [next(part.name for part in parts if part.members[place]) for place in range(n)]


@given(DOCUMENTS)
def test_occurrence_is_what_reading_the_text_in_order_gives(documents: list[list[int]]) -> None:
    expected, in_text = [], set[int]()
    for document in documents:
        in_document = set[int]()
        for place, token in enumerate(document):
            again = "first in its document, not in the text" if token in in_text else "first in the text"
            if place:
                expected.append("again in its document" if token in in_document else again)
            in_text.add(token)
            in_document.add(token)
    parts = occurrence_parts([np.array(document, np.int32) for document in documents])
    assert names(parts, len(expected)) == expected


@given(st.lists(st.integers(0, 2_000_000), min_size=1, max_size=50))
def test_frequencies_are_in_decades(counts: list[int]) -> None:
    parts = frequency_parts(np.array(counts, np.int64))
    for count, name in zip(counts, names(parts, len(counts)), strict=True):
        low = 10 ** (len(str(count)) - 1)
        assert name == (f"{low:,} to {10 * low - 1:,}" if count else "never")
    for part in parts:
        assert part.low is not None
        assert part.high is not None
        assert all(part.low <= count <= part.high for count in np.array(counts)[part.members])


@given(st.lists(st.one_of(st.just(math.inf), st.floats(0, 1e6, width=32)), min_size=1, max_size=80))
def test_distances_are_in_ten_parts_of_about_one_size(distances: list[float]) -> None:
    nearest = np.array(distances, np.float32)
    parts = distance_parts(nearest)
    names(parts, len(distances))
    assert parts[-1].members.tolist() == [math.isinf(distance) for distance in distances]
    found = np.isfinite(nearest).sum()
    assert len(parts) - 1 <= min(10, found)
    for before, after in pairwise(parts[:-1]):
        assert nearest[before.members].max() < nearest[after.members].min()
    if len(np.unique(nearest[np.isfinite(nearest)])) == found:
        assert all(part.members.sum() <= found / 10 + 1 for part in parts[:-1])
    for part in parts[:-1]:
        assert (part.low, part.high) == (nearest[part.members].min(), nearest[part.members].max())


def test_token_counts_are_of_the_ranges_that_are_asked_for() -> None:
    stream = np.random.default_rng(0).integers(0, 9, 100).astype(np.int32)
    stored = ShardedRows([stream[:37], stream[37:]], [0, 37])
    found = token_counts(stored, [(0, 20), (30, 77)], 12)
    assert found.tolist() == np.bincount(np.concatenate([stream[:20], stream[30:77]]), minlength=12).tolist()
    assert token_counts(stored, [], 12).tolist() == [0] * 12


def test_the_figures_of_a_group_are_those_of_its_tokens() -> None:
    chance = np.random.default_rng(1)
    lm = -chance.random(500).astype(np.float32)
    scores = Scores(lm, lm + chance.normal(0, 0.1, 500).astype(np.float32), chance.random(500).astype(np.float32))
    members = chance.random(500) < 0.3
    clusters = Clusters.among(np.repeat(np.arange(25), 20), np.tile(np.arange(20), 25))
    kept, rest = groups(scores, clusters, [Part("some", members, 1, 2), Part("none", np.zeros(500, bool)), Part("rest", ~members)])
    assert (kept.name, kept.tokens, kept.low, kept.high, rest.name) == ("some", members.sum(), 1, 2, "rest")
    base, knn = (math.exp(-sum(column[members].tolist()) / members.sum()) for column in (scores.lm, scores.mixed))
    assert (kept.base, kept.knn, kept.change) == pytest.approx((base, knn, knn / base - 1), rel=1e-6, abs=1e-6)
    assert kept.better == pytest.approx(sum(m > b for m, b in zip(scores.mixed[members], scores.lm[members], strict=True)) / members.sum())
    assert kept.weight == pytest.approx(sum(scores.weight[members].tolist()) / members.sum())
    assert kept.interval.low < kept.change < kept.interval.high


def test_impossible_for_both_is_no_change() -> None:
    before, after = np.array([-np.inf, -np.inf, -1], np.float32), np.array([-np.inf, -2, -np.inf], np.float32)
    assert gain_of(before, after).tolist() == [0, np.inf, -np.inf]
