"""The plots of a report, each a figure of one comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from knnlm.evaluation.comparison import Breakdown, Comparison, Histogram, PerToken, Reliability
from knnlm.evaluation.plotting import BASE, INK, MIXTURE, THIRD, subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WEIGHT_BINS = 20


def change_plot(histogram: Histogram) -> Figure:
    """How many tokens changed by how much; those that became less probable in another colour."""
    figure, (axes,) = subplots(1, 8, 3)
    middles = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    colors = [MIXTURE if middle < 0 else BASE for middle in middles]
    axes.bar(middles, histogram.counts, width=np.diff(histogram.edges), color=colors)
    axes.set_yscale("symlog", linthresh=1)
    filled = np.flatnonzero(histogram.counts)
    axes.set_xlim(histogram.edges[filled[0]] - 0.2, histogram.edges[filled[-1] + 1] + 0.2)
    axes.set(xlabel="change of log-probability, nats (above 0: more probable)", ylabel="tokens")
    return figure


def breakdown_plot(breakdown: Breakdown) -> Figure:
    """Change of perplexity in each group, with its interval."""
    groups = breakdown.groups
    figure, (axes,) = subplots(1, 8, 1.2 + 0.32 * len(groups))
    places = np.arange(len(groups))[::-1]
    changes = np.array([100 * group.change for group in groups])
    low = changes - np.array([100 * group.interval.low for group in groups])
    high = np.array([100 * group.interval.high for group in groups]) - changes
    colors = [MIXTURE if change > 0 else BASE for change in changes]
    axes.barh(places, changes, color=colors, alpha=0.75)
    known = np.isfinite(low) & np.isfinite(high)
    errors = np.clip(np.stack([low, high])[:, known], 0, None)
    axes.errorbar(changes[known], places[known], xerr=errors, fmt="none", ecolor=INK, capsize=3)
    axes.set_yticks(places, [group.name for group in groups])
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="change of perplexity against the base LM, % (below 0: better)")
    return figure


def reliability_plot(base: Reliability, knn: Reliability) -> Figure:
    """Accuracy against confidence, a dot for each bin; on the diagonal they are the same."""
    figure, (axes,) = subplots(1, 4.6, 4.2)
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
    for name, found, color, marker in (("base LM", base, BASE, "o"), ("kNN-LM", knn, MIXTURE, "s")):
        there = found.counts > 0
        label = f"{name}, calibration error {found.error:.4f}"
        axes.plot(found.confidences[there], found.accuracies[there], marker=marker, color=color, label=label)
    axes.set(xlabel="probability of the most probable token", ylabel="share in which it is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def weight_plot(per_token: PerToken) -> Figure:
    """How many tokens had which λ; those without a search apart."""
    figure, (axes,) = subplots(1, 8, 2.6)
    bins = np.linspace(0, 1, WEIGHT_BINS + 1)
    parts = [per_token.weight[per_token.searched], per_token.weight[~per_token.searched]]
    axes.hist(parts, bins=bins, stacked=True, color=[BASE, MIXTURE], label=["searched", "search skipped"])
    axes.set(xlabel="λ, the weight of the neighbours", ylabel="tokens", xlim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def cost_plot(comparison: Comparison) -> Figure:
    """Where the time went."""
    figure, (axes,) = subplots(1, 8, 1.3)
    left = 0.0
    cost = comparison.cost
    for name, share, color in (("forward", cost.forward, BASE), ("search", cost.search, MIXTURE), ("mixing", cost.mixing, THIRD)):
        axes.barh(0, 100 * share, left=left, color=color, label=f"{name} {share:.0%}")
        left += 100 * share
    axes.set(xlabel="% of the time", xlim=(0, 100), yticks=[])
    axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure
