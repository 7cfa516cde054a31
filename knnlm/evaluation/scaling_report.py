"""How ``knnlm scaling`` is shown: three tables, or one JSON object with every point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from knnlm import __version__, console
from knnlm.evaluation.scaling import Measured, Point, Scaling
from knnlm.opening import OpenedKNNLM

FORMAT = 1


def content(opened: OpenedKNNLM, scaling: Scaling) -> dict[str, Any]:
    """As ``--json`` prints it (docs/scaling.md)."""
    manifest = opened.store.manifest
    facts = {
        "store": str(opened.store.path),
        "datastore": manifest.fingerprint,
        "model": opened.model.name,
        "dtype": opened.model.dtype,
        "index": opened.retriever.index.description,
        "entries": manifest.live_entries,
        "mixture_from": opened.mixture_source,
        "max_length": manifest.windowing.max_length,
        "stride": manifest.windowing.stride,
    }
    return {"format": FORMAT, "knnlm": __version__, **asdict(scaling), "facts": facts}


def show(opened: OpenedKNNLM, scaling: Scaling) -> None:
    """Print sizes at the mixture's k, every k at the largest size, and search settings."""
    mixture = scaling.mixture
    most = max(point.entries for point in scaling.points)
    console.out.print(_points_table(f"Datastore size, k={mixture.k}", scaling, scaling.at_k(mixture.k)))
    console.out.print(_points_table(f"Neighbours, {most:,} entries", scaling, scaling.at_size(most)))
    if scaling.settings:
        console.out.print(_settings_table(scaling))
    base = scaling.base
    console.out.print(
        f"base LM: perplexity {base.perplexity:.2f} (± {base.standard_error:.2f}), {scaling.base_tokens_per_second:,.0f} tokens/s; "
        f"{scaling.tokens:,} tokens of {scaling.documents:,} documents; standard errors over {scaling.clusters}"
    )
    console.out.print(f"kNN temperature={mixture.temperature:g}, weight={mixture.weight:g} ({opened.mixture_source}); one λ for all tokens")
    if scaling.calibration_tokens:
        console.out.print(f"λ fitted on {scaling.calibration_tokens:,} tokens of calibration text, at each size and k")
    if scaling.settings:
        console.out.print(f"settings compared with {scaling.reference}, at {scaling.reference_tokens:,} tokens; * the store's own")
    else:
        console.out.print(f"no search setting to vary: {opened.retriever.index.description} compares every key")


def _points_table(title: str, scaling: Scaling, points: Sequence[Point]) -> Table:
    fitted = ["λ fitted", "perplexity", "change", "± s.e."] if scaling.calibration_tokens else []
    columns = ["documents", "entries", "k", "perplexity", "± s.e.", "change", "± s.e.", *fitted]
    rows = [
        [
            f"{point.documents:,}",
            f"{point.entries:,}",
            f"{point.k:,}",
            f"{point.fixed.perplexity:.2f}",
            f"{point.fixed.standard_error:.2f}",
            *_change(point.fixed),
            *(() if point.refitted is None else (f"{point.refitted.weight:.3f}", f"{point.refitted.perplexity:.2f}")),
            *(() if point.refitted is None else _change(point.refitted)),
        ]
        for point in points
    ]
    return console.table(title, columns, rows)


def _settings_table(scaling: Scaling) -> Table:
    rows = [
        [
            f"{point.probes:,}{'*' if point.own else ''}",
            f"{point.overfetch:g}",
            f"{point.total_variation:.4f}",
            f"{point.total_variation_standard_error:.4f}",
            f"{point.recall:.3f}",
            f"{point.measured.perplexity:.2f}",
            *_change(point.measured),
            f"{point.tokens_per_second:,.0f}",
        ]
        for point in scaling.settings
    ]
    columns = ["probes", "over-fetch", "TV", "± s.e.", "recall", "perplexity", "change", "± s.e.", "tokens/s"]
    return console.table(f"Search settings, k={scaling.mixture.k}", columns, rows)


def _change(measured: Measured) -> tuple[str, str]:
    return f"{measured.change:+.2%}", f"{measured.change_standard_error:.2%}"
