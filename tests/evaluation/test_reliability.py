"""Expected calibration error and the reliability diagram, token by token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.evaluation.reliability import BINS, reliability

TOKENS = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60)


@given(TOKENS)
def test_it_equals_a_loop_over_bins(tokens: list[tuple[float, bool]]) -> None:
    with np.errstate(divide="ignore"):
        log_probs = np.log(np.array([p for p, _ in tokens], np.float32))
    found = reliability(log_probs, np.array([right for _, right in tokens]))
    confidences = [min(1.0, math.exp(value)) for value in log_probs.astype(float).tolist()]
    error = 0.0
    for place in range(BINS):
        low, high = found.edges[place], found.edges[place + 1]
        own = [(c, r) for c, (_, r) in zip(confidences, tokens, strict=True) if low < c <= high or (place == 0 and c == 0)]
        assert found.counts[place] == len(own)
        if not own:
            assert math.isnan(found.confidences[place])
            assert math.isnan(found.accuracies[place])
            continue
        confidence, accuracy = sum(c for c, _ in own) / len(own), sum(r for _, r in own) / len(own)
        assert (found.confidences[place], found.accuracies[place]) == pytest.approx((confidence, accuracy))
        error += len(own) / len(tokens) * abs(accuracy - confidence)
    assert found.error == pytest.approx(error)
    assert found.accuracy == pytest.approx(sum(r for _, r in tokens) / len(tokens))
    assert found.confidence == pytest.approx(sum(confidences) / len(tokens))


def test_what_is_drawn_from_its_own_probabilities_is_calibrated() -> None:
    chance = np.random.default_rng(0)
    confidence = chance.random(100_000)
    drawn = chance.random(100_000) < confidence
    assert reliability(np.log(confidence), drawn).error < 0.01
    assert reliability(np.log(np.sqrt(confidence)), drawn).error == pytest.approx(2 / 3 - 1 / 2, abs=0.01)
