"""Windows: every token but a document's first is a target once, with the context that the definition promises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.errors import InvalidInput
from knnlm.windows import Window, Windowing, windows
from tests.reference import context_start

WINDOWINGS = st.integers(2, 40).flatmap(lambda m: st.builds(Windowing, st.just(m), st.integers(1, m)))
LENGTHS = st.integers(0, 150)


@given(LENGTHS, WINDOWINGS)
def test_each_token_but_the_first_is_a_target_exactly_once_in_order(length: int, windowing: Windowing) -> None:
    targets = [t for w in windows(length, windowing) for t in range(w.first_target, w.end)]
    assert targets == list(range(1, length))


@given(LENGTHS, WINDOWINGS)
def test_context_is_at_least_m_minus_s_where_the_document_has_it_and_never_none(length: int, windowing: Windowing) -> None:
    promised = max(1, windowing.max_length - windowing.stride)
    for window in windows(length, windowing):
        for target in range(window.first_target, window.end):
            assert target - window.start >= min(promised, target)
            assert target - window.start >= 1


@given(LENGTHS, WINDOWINGS)
def test_a_window_reads_at_most_max_length_tokens_and_predicts_at_most_stride(length: int, windowing: Windowing) -> None:
    for window in windows(length, windowing):
        assert 0 <= window.start < window.first_target < window.end <= length
        assert 1 <= window.input_length <= windowing.max_length
        assert 1 <= window.target_count <= windowing.stride


@given(LENGTHS, WINDOWINGS)
def test_starts_are_those_of_the_definition(length: int, windowing: Windowing) -> None:
    for window in windows(length, windowing):
        for target in range(window.first_target, window.end):
            assert window.start == context_start(target, windowing.max_length, windowing.stride)


@given(LENGTHS, WINDOWINGS)
def test_targets_are_the_last_columns_of_their_window(length: int, windowing: Windowing) -> None:
    for window in windows(length, windowing):
        assert window.first_target - 1 - window.start == window.input_length - window.target_count


def test_stride_equal_to_max_length_reads_one_token_before_the_block() -> None:
    assert list(windows(9, Windowing(4, 4))) == [Window(0, 1, 4), Window(3, 4, 8), Window(7, 8, 9)]


def test_stride_one_slides_by_one_token() -> None:
    assert list(windows(5, Windowing(3, 1))) == [Window(0, 1, 2), Window(0, 2, 3), Window(1, 3, 4), Window(2, 4, 5)]


@pytest.mark.parametrize("length", [0, 1])
def test_a_document_without_second_token_has_no_window(length: int) -> None:
    assert list(windows(length, Windowing(8, 4))) == []


@pytest.mark.parametrize(
    ("max_length", "stride", "field"), [(1, 1, "max_length"), (0, 1, "max_length"), (8, 0, "stride"), (8, 9, "stride"), (8, -1, "stride")]
)
def test_impossible_windowings_are_refused_by_field(max_length: int, stride: int, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Windowing(max_length, stride)
    assert refused.value.field == field


def test_defaults_are_the_context_up_to_1024_and_half_of_it() -> None:
    assert Windowing.for_context(64) == Windowing(64, 32)
    assert Windowing.for_context(8192) == Windowing(1024, 512)
    assert Windowing.for_context(8192, max_length=2048) == Windowing(2048, 1024)
    assert Windowing.for_context(64, stride=64) == Windowing(64, 64)
    assert Windowing.for_context(3) == Windowing(3, 1)


def test_more_than_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(InvalidInput, match=r"128.*64") as refused:
        Windowing.for_context(64, max_length=128)
    assert refused.value.field == "max_length"
