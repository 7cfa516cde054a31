"""How a calibration is shown: the best mixture, and the best of each k beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from knnlm import console
from knnlm.datastore.profile import PROFILE
from knnlm.evaluation.calibration import Calibration
from knnlm.evaluation.mixture_fit import Point


def show(calibration: Calibration, store: Path, *, saved: bool, as_json: bool) -> None:
    """Print what was found, and where it was saved."""
    mixture = calibration.fit.mixture
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
    console.out.print(f"saved as {store / PROFILE}" if saved else "not saved (--dry-run)")


def best_of_each_k(surface: Sequence[Point]) -> list[Point]:
    """The best point of each k, by k."""
    sizes = sorted({point.k for point in surface})
    return [min((point for point in surface if point.k == k), key=lambda point: point.loss) for k in sizes]
