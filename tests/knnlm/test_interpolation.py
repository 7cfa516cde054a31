"""The mixture: weight 0 is the LM bit for bit, weight 1 is p_kNN, and between them it sums to 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.interpolation import effective_weight, interpolate
from tests import reference

VOCABULARY = 11


def distributions(seed: int, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random LM log-probabilities, and those of neighbours that leave most tokens out."""
    generator = torch.Generator().manual_seed(seed)
    lm = (5 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype).log_softmax(-1)
    scores = 5 * torch.randn(rows, VOCABULARY, generator=generator)
    scores[torch.rand(rows, VOCABULARY, generator=generator) < 0.6] = -math.inf
    scores[:, 0] = 0.5
    return lm, scores.to(dtype).log_softmax(-1)


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_mixture_sums_to_one_and_equals_numpy(seed: int, weight: float) -> None:
    lm, knn = distributions(seed)
    mixed = interpolate(lm, knn, weight)
    np.testing.assert_allclose(mixed.double().exp().sum(1).numpy(), 1, atol=1e-5)
    expected = np.stack([reference.mixture(a, np.exp(b), weight) for a, b in zip(lm.double().numpy(), knn.double().numpy(), strict=True)])
    np.testing.assert_allclose(mixed.double().numpy(), expected, rtol=1e-5, atol=2e-6)


@given(st.integers(0, 10_000))
def test_weight_0_is_the_lm_bit_for_bit(seed: int) -> None:
    lm, knn = distributions(seed)
    assert torch.equal(interpolate(lm, knn, 0.0).view(torch.int32), lm.view(torch.int32))
    assert torch.equal(interpolate(lm, torch.full_like(lm, -math.inf), 0), lm)


@given(st.integers(0, 10_000))
def test_weight_1_is_p_knn(seed: int) -> None:
    lm, knn = distributions(seed)
    assert torch.equal(interpolate(lm, knn, 1.0), knn)


def test_weights_are_per_row() -> None:
    lm, knn = distributions(3)
    mixed = interpolate(lm, knn, torch.tensor([0.0, 1.0, 0.25, 0.75], dtype=torch.float64))
    assert torch.equal(mixed[0], lm[0])
    assert torch.equal(mixed[1], knn[1])
    for index, weight in ((2, 0.25), (3, 0.75)):
        assert torch.equal(mixed[index], interpolate(lm, knn, weight)[index])


def test_one_token_per_row_is_the_gather_of_the_dense_form() -> None:
    lm, knn = distributions(5)
    tokens = torch.tensor([0, 3, 7, 10])
    weights = torch.tensor([0.0, 0.3, 0.6, 1.0])
    some = interpolate(lm.gather(1, tokens[:, None])[:, 0], knn.gather(1, tokens[:, None])[:, 0], weights)
    assert torch.equal(some, interpolate(lm, knn, weights).gather(1, tokens[:, None])[:, 0])


def test_a_token_that_neither_knows_stays_impossible_without_nan() -> None:
    impossible = torch.tensor([[0.0, -math.inf]])
    for weight in (0.0, 0.5, 1.0):
        assert interpolate(impossible, impossible, weight).tolist() == [[0.0, -math.inf]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keeps_the_dtype_of_the_lm(dtype: torch.dtype) -> None:
    lm, knn = distributions(1, dtype=dtype)
    assert interpolate(lm, knn.float(), 0.3).dtype == dtype


def test_a_row_without_neighbours_is_the_lm_alone() -> None:
    lm, knn = distributions(9, rows=2)
    knn[1] = -math.inf
    weight = effective_weight(torch.tensor([0.4, 0.4], dtype=torch.float64), torch.tensor([[True, False], [False, False]]))
    assert weight.tolist() == [0.4, 0.0]
    mixed = interpolate(lm, knn, weight)
    assert torch.equal(mixed[1], lm[1])
    assert not torch.equal(mixed[0], lm[0])


def test_effective_weight_of_rows_of_width_0_is_0() -> None:
    assert effective_weight(torch.tensor([0.4, 1.0]), torch.zeros((2, 0), dtype=torch.bool)).tolist() == [0, 0]
