"""The plot of ``knnlm scaling``: perplexity against datastore size, against k, and against what a search setting costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from knnlm.evaluation.plotting import BASE, MIXTURE, SERIES, THIRD, subplots
from knnlm.evaluation.scaling import Measured, Scaling

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def scaling_plot(scaling: Scaling) -> Figure:
    """Two panels, and a third where settings were measured. Bars are standard errors."""
    figure, axes = subplots(3 if scaling.settings else 2, 15 if scaling.settings else 10, 4)
    _by_size(axes[0], scaling)
    _by_k(axes[1], scaling)
    if scaling.settings:
        _by_setting(axes[2], scaling)
    return figure


def _by_size(axes: Any, scaling: Scaling) -> None:
    """The change against the base LM, whose paired errors are smaller than those of the perplexities."""
    points = scaling.at_k(scaling.mixture.k)
    entries = [point.entries for point in points]
    axes.axhline(0, color=BASE, linestyle="--", label="base LM")
    _line(axes, entries, [point.fixed for point in points], f"λ = {scaling.mixture.weight:g}", MIXTURE)
    refitted = [point.refitted for point in points if point.refitted is not None]
    if refitted:
        _line(axes, entries, refitted, "λ fitted at each size", THIRD)
    axes.set(xscale="log", xlabel="entries", ylabel="change of perplexity, %", title=f"datastore size, k = {scaling.mixture.k}")
    axes.set_xticks(entries, [f"{count:,}" for count in entries], rotation=30)
    axes.minorticks_off()
    axes.legend()


def _by_k(axes: Any, scaling: Scaling) -> None:
    axes.axhline(scaling.base.perplexity, color=BASE, linestyle="--", label="base LM")
    sizes = sorted({point.entries for point in scaling.points})
    for number, entries in enumerate(sizes[::-1][: len(SERIES)]):
        points = scaling.at_size(entries)
        best = [point.refitted or point.fixed for point in points]
        axes.plot(
            [point.k for point in points], [m.perplexity for m in best], marker=".", color=SERIES[number], label=f"{entries:,} entries"
        )
    fitted = "λ fitted" if scaling.calibration_tokens else f"λ = {scaling.mixture.weight:g}"
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", ylabel="perplexity", title=f"neighbours, {fitted}")
    axes.legend(fontsize="small")


def _by_setting(axes: Any, scaling: Scaling) -> None:
    for point in scaling.settings:
        axes.errorbar(
            point.tokens_per_second, point.total_variation, yerr=point.total_variation_standard_error,
            marker="o" if point.own else ".", color=MIXTURE if point.own else BASE,
        )  # fmt: skip
        axes.annotate(f" {point.probes}, {point.overfetch:g}x", (point.tokens_per_second, point.total_variation), fontsize="small")
    axes.set(xlabel="tokens/s", ylabel="total variation from exact search", title="search: probes, over-fetch")
    axes.set_ylim(bottom=0)


def _line(axes: Any, x: Sequence[int], measured: Sequence[Measured], label: str, color: str) -> None:
    errors = [100 * point.change_standard_error for point in measured]
    axes.errorbar(x, [100 * point.change for point in measured], yerr=errors, marker="o", capsize=3, color=color, label=label)
