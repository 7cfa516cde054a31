"""Which setting applies to which k: measured ones, and what is made of them between, below and beyond."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput
from knnlm.search_settings import SearchPoint, SearchSetting, SearchSettings, SearchTuning

MEASURED = (SearchSetting(16, 12, 3.0), SearchSetting(64, 8, 1.5), SearchSetting(256, 20, 2.0))
SETTINGS = SearchSettings(100, 10_000, MEASURED)


@pytest.mark.parametrize("setting", MEASURED)
def test_what_was_measured_applies_to_its_k(setting: SearchSetting) -> None:
    assert SETTINGS.for_k(setting.k) == setting


@pytest.mark.parametrize(
    ("k", "probes", "overfetch"),
    [(17, 12, 3.0), (63, 12, 3.0), (65, 20, 2.0), (255, 20, 2.0), (15, 12, 48 / 15), (1, 12, 48.0)],
)
def test_between_measured_ones_it_is_never_less_than_the_neighbours_settings(k: int, probes: int, overfetch: float) -> None:
    assert SETTINGS.for_k(k) == SearchSetting(k, probes, overfetch)


@given(st.integers(1, 16))
def test_below_the_smallest_as_many_candidates_are_measured_as_for_it(k: int) -> None:
    assert math.ceil(SETTINGS.for_k(k).overfetch * k) in (48, 49)


@given(st.integers(257, 4096))
def test_beyond_the_largest_probes_grow_with_k(k: int) -> None:
    assert SETTINGS.for_k(k) == SearchSetting(k, min(100, max(math.ceil(20 * k / 256), min(max(math.ceil(k / 10), 16), 256))), 2.0)


@given(st.integers(1, 4096), st.integers(1, 20_000))
def test_entries_left_out_cost_as_many_more_probes_and_more_entries_never_fewer(k: int, allowed: int) -> None:
    scarce = max(1.0, 10_000 / allowed)
    assert SETTINGS.for_k(k, allowed).probes == min(100, math.ceil(SETTINGS.for_k(k).probes * scarce))
    assert SETTINGS.for_k(k, allowed).overfetch == SETTINGS.for_k(k).overfetch


@given(st.integers(1, 5000), st.integers(0, 300), st.sampled_from([1.0, 1.5, 4.0]))
def test_a_fixed_setting_is_the_same_for_every_k(k: int, probes: int, overfetch: float) -> None:
    assert SearchSettings.fixed(300, 5000, probes, overfetch).for_k(k) == SearchSetting(k, probes, overfetch)


def point(k: int, probes: int, overfetch: float) -> SearchPoint:
    return SearchPoint(k, probes, overfetch, 0.001, 0.0, 0.002, 0.003, 0.99, 0.0, 1000)


def test_a_tuning_gives_its_settings_and_their_points() -> None:
    tuning = SearchTuning("exact", "", 9, 0.005, 10.0, 500, 7, True, [SearchSetting(4, 2, 1.5)], [point(4, 1, 1.5), point(4, 2, 1.5)])
    assert SearchSettings.tuned(tuning) == SearchSettings(7, 500, (SearchSetting(4, 2, 1.5),))
    assert tuning.point(tuning.settings[0]) == point(4, 2, 1.5)
    with pytest.raises(InvalidInput, match="probes 3"):
        tuning.point(SearchSetting(4, 3, 1.5))
