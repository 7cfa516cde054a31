"""The surface of a calibration as a picture: perplexity by temperature, a line for each k. Needs matplotlib (extra ``report``)."""

from __future__ import annotations

import math
from pathlib import Path

from knnlm.evaluation.mixture_fit import Fit


def plot_surface(fit: Fit, path: Path) -> None:
    """Write the picture; its format is that of the file's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k in sorted({point.k for point in fit.surface}):
        points = [point for point in fit.surface if point.k == k]
        axes.plot([point.temperature for point in points], [math.exp(point.loss) for point in points], marker=".", label=f"k = {k:,}")
    axes.axhline(math.exp(fit.base_loss), linestyle="--", color="gray", label="base LM")
    axes.plot(fit.mixture.temperature, math.exp(fit.loss), marker="*", markersize=14, color="black", linestyle="none", label="best")
    axes.set(xscale="log", xlabel="kNN temperature", ylabel="perplexity with the best weight")
    axes.legend()
    figure.savefig(path)
