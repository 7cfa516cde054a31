"""Calibration of a next-token distribution: is the most probable token right as often as its probability says?

Expected calibration error and reliability diagram as in Guo et al. (2017), section 2, over equally wide bins.
"""

from __future__ import annotations

import numpy as np

from knnlm.evaluation.comparison import BoolArray, FloatArray, Reliability

BINS = 15


def reliability(best_log_probs: FloatArray, right: BoolArray) -> Reliability:
    """Of n tokens: ``best_log_probs`` [n], of the most probable token at each place; ``right`` [n], whether it came."""
    confidence = np.minimum(np.exp(best_log_probs.astype(np.float64)), 1.0)
    edges = np.linspace(0, 1, BINS + 1)
    # A bin has its upper edge, so that 1 lies in the last and the first has 0, too.
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    nothing = np.full(BINS, np.nan)
    confidences = np.divide(np.bincount(place, confidence, BINS), counts, out=nothing.copy(), where=counts > 0)
    accuracies = np.divide(np.bincount(place, right, BINS), counts, out=nothing.copy(), where=counts > 0)
    error = float(np.nansum(counts * np.abs(accuracies - confidences)) / len(right))
    return Reliability(error, float(right.mean()), float(confidence.mean()), edges, counts, confidences, accuracies)
