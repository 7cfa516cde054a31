"""Sampling: the processors and order of transformers, one uniform number per draw, and refusals that name the field."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from knnlm.errors import InvalidInput
from knnlm.sampling import SamplingParams, process, sample

VOCABULARY = 40
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3, 2.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 39, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
HISTORIES = st.lists(st.integers(0, VOCABULARY - 1), max_size=6)


def log_probs(seed: int, impossible: int = 0) -> torch.Tensor:
    """A random distribution in which the last ``impossible`` tokens have probability 0."""
    scores = 3 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed))
    if impossible:
        scores[-impossible:] = -math.inf
    return scores.log_softmax(-1)


def by_transformers(said: torch.Tensor, params: SamplingParams, history: list[int]) -> torch.Tensor:
    """The same with a processor list as ``generate`` builds it."""
    steps: list[Any] = []
    if params.repetition_penalty != 1 and history:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(top_k=params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(top_p=params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(min_p=params.min_p))
    scores = said[None]
    for step in steps:
        scores = step(torch.tensor([history], dtype=torch.int64), scores)
    return scores[0]


@given(st.integers(0, 10_000), PARAMS, HISTORIES, st.sampled_from([0, 10]))
def test_equals_the_processors_of_transformers_in_their_order(
    seed: int, params: SamplingParams, history: list[int], impossible: int
) -> None:
    said = log_probs(seed, impossible)
    assert torch.equal(process(said, params, history), by_transformers(said, params, history))


@given(st.integers(0, 10_000), PARAMS, HISTORIES, st.sampled_from([0.0, 5e-324, 1e-12, 0.5, math.nextafter(1.0, 0.0)]))
def test_no_draw_falls_outside_the_truncated_set(seed: int, params: SamplingParams, history: list[int], uniform: float) -> None:
    said = log_probs(seed, impossible=10)
    token = sample(said, params, history, uniform)
    assert process(said, params, history)[token] > -math.inf


@given(st.integers(0, 10_000), HISTORIES, st.floats(0, 1, exclude_max=True))
def test_temperature_0_takes_the_most_probable_token_whatever_else_is_set(seed: int, history: list[int], uniform: float) -> None:
    said = log_probs(seed)
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0, top_k=3, top_p=0.2, min_p=0.9)):
        assert sample(said, params, history, uniform) == int(said.argmax())


def test_temperature_0_breaks_ties_by_the_smaller_id() -> None:
    said = torch.log(torch.tensor([0.1, 0.3, 0.3, 0.3]))
    assert sample(said, SamplingParams(temperature=0), [], 0.9) == 1


def test_repetition_penalty_applies_to_greedy_too_and_works_on_normalised_values() -> None:
    said = torch.log(torch.tensor([0.45, 0.40, 0.15]))
    assert sample(said, SamplingParams(temperature=0, repetition_penalty=1.5), [0], 0) == 1
    assert sample(said, SamplingParams(temperature=0, repetition_penalty=1.01), [0], 0) == 0


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    said = torch.log(torch.tensor([0.25, 0.0, 0.5, 0.25], dtype=torch.float64))
    expected = [(0.0, 0), (0.2499, 0), (0.25, 2), (0.7499, 2), (0.7501, 3), (math.nextafter(1, 0), 3)]
    assert [sample(said, SamplingParams(), [], u) for u, _ in expected] == [token for _, token in expected]


@given(st.integers(0, 10_000))
def test_the_same_numbers_draw_the_same_tokens(seed: int) -> None:
    said = log_probs(seed)
    first, second = ([sample(said, SamplingParams(temperature=1.5), [], u) for u in uniforms(seed)] for _ in range(2))
    assert first == second


def uniforms(seed: int) -> list[float]:
    chance = random.Random(seed)
    return [chance.random() for _ in range(8)]


def test_draws_follow_the_distribution() -> None:
    said = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    draws = [sample(said, SamplingParams(), [], (i + 0.5) / 1000) for i in range(1000)]
    assert [draws.count(token) for token in range(4)] == [100, 200, 300, 400]


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1e5])
def test_extreme_temperatures_that_are_accepted_draw_a_possible_token(temperature: float) -> None:
    said = log_probs(2, impossible=10)
    for uniform in (0.0, 0.5, math.nextafter(1, 0)):
        token = sample(said, SamplingParams(temperature=temperature).validate(), [], uniform)
        assert said[token] > -math.inf
        assert temperature > 1 or token == int(said.argmax())


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e40, 1e300])
def test_temperatures_that_leave_no_token_in_float32_are_refused(temperature: float) -> None:
    with pytest.raises(InvalidInput) as refused:
        SamplingParams(temperature=temperature).validate()
    assert refused.value.field == "temperature"


def test_a_certain_token_survives_everything() -> None:
    said = torch.full((5,), -math.inf)
    said[3] = 0.0
    for params in (
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(top_p=0.01),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=0.01),
    ):
        assert sample(said, params, [3, 1], 0.999) == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.inf), ("temperature", math.nan), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.01),
        ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf),
        ("repetition_penalty", math.nan),
    ],
)  # fmt: skip
def test_out_of_range_values_are_refused_by_field_with_the_callers_prefix(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=str(value).replace("-", "\\-")) as refused:
        replace(SamplingParams(), **{field: value}).validate("sampling.")  # type: ignore[arg-type]
    assert refused.value.field == f"sampling.{field}"


@given(PARAMS)
def test_validate_returns_what_it_accepts(params: SamplingParams) -> None:
    assume(params.top_k >= 0)
    assert params.validate() is params
