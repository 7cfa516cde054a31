"""The most probable token of the mixture, against the whole mixture over the vocabulary."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from knnlm.distribution import knn_log_probs, neighbor_token_log_probs
from knnlm.evaluation import best_tokens as module
from knnlm.evaluation.best_tokens import best_tokens, token_votes
from knnlm.interpolation import effective_weight, interpolate
from knnlm.neighbors import Neighbors

VOCABULARY = 12


def drawn(seed: int, n: int, k: int) -> tuple[torch.Tensor, Neighbors]:
    """Log-probabilities and neighbours, nearest first, of which rows lack some or all."""
    chance = torch.Generator().manual_seed(seed)
    log_probs = (4 * torch.randn(n, VOCABULARY, generator=chance)).log_softmax(-1)
    distances = (30 * torch.rand(n, k, generator=chance)).sort(1).values
    tokens = torch.randint(0, VOCABULARY, (n, k), generator=chance)
    missing = torch.arange(k) >= torch.randint(0, k + 1, (n, 1), generator=chance)
    ids = torch.randint(0, 1000, (n, k), generator=chance).masked_fill(missing, -1)
    return log_probs, Neighbors(distances.masked_fill(missing, torch.inf), tokens.masked_fill(missing, 0), ids)


@given(
    st.integers(0, 1000), st.integers(1, 9), st.integers(0, 8), st.sampled_from([1e-3, 1.0, 1e4]), st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    st.integers(1, 50),
)  # fmt: skip
def test_it_is_the_largest_of_the_whole_mixture(seed: int, n: int, k: int, temperature: float, weight: float, scratch: int) -> None:
    lm, neighbors = drawn(seed, n, k)
    weights = effective_weight(torch.full((n,), weight, dtype=torch.float64), neighbors.found)
    with patch.object(module, "SCRATCH_FLOATS", scratch):
        found = best_tokens(lm, neighbors, temperature, weights)
    mixed = interpolate(lm, knn_log_probs(neighbors, temperature, VOCABULARY), weights) if k else lm
    np.testing.assert_allclose(found.log_probs, mixed.max(1).values, atol=1e-5)
    np.testing.assert_allclose(mixed.gather(1, found.mixed[:, None])[:, 0], found.log_probs, atol=1e-5)
    assert found.lm.tolist() == lm.argmax(1).tolist()
    assert torch.equal(found.lm_log_probs, lm.max(1).values)
    base = weights == 0
    assert torch.equal(found.mixed[base], found.lm[base])
    assert torch.equal(found.log_probs[base], found.lm_log_probs[base])


@pytest.mark.parametrize("scratch", [1, 5 * VOCABULARY, 1 << 20])
def test_votes_are_those_of_the_sorted_sum(scratch: int) -> None:
    _, neighbors = drawn(3, 13, 40)
    with patch.object(module, "SCRATCH_FLOATS", scratch):
        found = token_votes(neighbors, 10.0, VOCABULARY)
    expected = neighbor_token_log_probs(neighbors, 10.0).exp()
    np.testing.assert_allclose(found[neighbors.found], expected[neighbors.found], atol=1e-6)
