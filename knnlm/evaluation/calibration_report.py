"""How a calibration is shown: the best mixture of each k, the ways to choose λ side by side, and what skipping would save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from knnlm import console
from knnlm.datastore.profile import PROFILE
from knnlm.evaluation.calibration import Calibration
from knnlm.evaluation.gate_choice import GateChoice, Judged
from knnlm.evaluation.mixture_fit import Point


def show(calibration: Calibration, store: Path, *, saved: bool, as_json: bool) -> None:
    """Print what was found, and where it was saved."""
    mixture = calibration.fit.mixture
    if calibration.overlap.is_much:
        console.messages.print(
            f"warning: {calibration.overlap.share:.0%} of the text's 13-token sequences stand in the datastore, so these settings fit "
            "text that it knows by heart; calibrate on text that it does not hold"
        )
    if as_json:
        content = {"k": mixture.k, "knn_temperature": mixture.temperature, "weight": mixture.weight, "documents": calibration.documents}
        facts = calibration.measured() | {"surface": [asdict(point) for point in calibration.fit.surface]}
        console.print_json({**content, **facts, "saved": saved})
        return
    rows = [
        [f"{point.k:,}", f"{point.temperature:.3g}", f"{point.weight:.3f}", f"{math.exp(point.loss):.2f}"]
        for point in best_of_each_k(calibration.fit.surface)
    ]
    console.out.print(console.table("", ["k", "kNN temperature", "weight", "perplexity"], rows))
    change = calibration.perplexity / calibration.base_perplexity - 1
    console.out.print(
        f"{calibration.tokens:,} tokens of {calibration.documents:,} documents: base LM {calibration.base_perplexity:.2f}, "
        f"best mixture {calibration.perplexity:.2f} ({change:+.1%}) "
        f"with k={mixture.k}, kNN temperature={mixture.temperature:.4g}, weight={mixture.weight:.4g}"
    )
    if mixture.weight == 0:
        console.messages.print("warning: the datastore does not help on this text at any weight, so the best mixture is the base LM alone")
    if calibration.choice is None:
        console.out.print("no adaptive weight: the text is too short to hold any of it out")
    else:
        _show_choice(calibration.choice)
    console.out.print(f"saved as {store / PROFILE}" if saved else "not saved (--dry-run)")


def _show_choice(choice: GateChoice) -> None:
    rows = [_row(judged) for judged in (choice.base, choice.fixed, *choice.forms)]
    console.out.print(console.table("on held-out documents", ["weight", "", "perplexity", "± s.e.", "against fixed", "± s.e."], rows))
    if choice.negatives:
        rows = [_row(judged) for judged in choice.negatives]
        columns = ["text of no use", "", "perplexity", "± s.e.", "against base LM", "± s.e."]
        console.out.print(console.table(f"with the {choice.chosen}", columns, rows))
    if choice.gate is None:
        console.out.print(f"no adaptive weight: the best, a {choice.chosen}, is not better than the fixed one by a standard error")
        return
    zeros = f"{choice.zeros:.1%} of tokens have weight 0"
    if choice.skip is None:
        console.out.print(f"adaptive weight: {choice.chosen}; {zeros}; no search is worth skipping")
    else:
        console.out.print(
            f"adaptive weight: {choice.chosen}; {zeros}; {choice.skip.saved:.1%} of searches are skipped "
            f"(perplexity {choice.skip.change:+.2%})"
        )


def _row(judged: Judged) -> list[str]:
    numbers = [f"{judged.perplexity:.2f}", f"{judged.standard_error:.2f}", f"{judged.change:+.2%}", f"{judged.change_standard_error:.2%}"]
    return [judged.name, judged.detail, *numbers]


def best_of_each_k(surface: Sequence[Point]) -> list[Point]:
    """The best point of each k, by k."""
    sizes = sorted({point.k for point in surface})
    return [min((point for point in surface if point.k == k), key=lambda point: point.loss) for k in sizes]
