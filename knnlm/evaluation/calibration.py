"""``calibrate``: the mixture that fits a text best, from one pass of LM and search, as the datastore's profile."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.datastore.profile import Profile
from knnlm.evaluation.mixture_fit import Fit, fit_mixture
from knnlm.evaluation.neighbor_cache import fill_cache
from knnlm.opening import OpenedKNNLM, profile_facts
from knnlm.tokenized import TokenizedDocument

MOST_NEIGHBORS = 1024


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found over ``tokens`` of a text; perplexities of base LM and mixture on that very text, which
    the mixture was chosen for."""

    fit: Fit
    tokens: int
    documents: int

    @property
    def base_perplexity(self) -> float:
        """Of the base LM."""
        return math.exp(self.fit.base_loss)

    @property
    def perplexity(self) -> float:
        """Of the best mixture."""
        return math.exp(self.fit.loss)

    def measured(self) -> dict[str, Any]:
        """For the profile: what was measured, and the surface of all settings looked at."""
        return {
            "tokens": self.tokens,
            "base_perplexity": self.base_perplexity,
            "perplexity": self.perplexity,
            "surface": [[point.k, point.temperature, point.weight, point.loss] for point in self.fit.surface],
        }


def calibrate(
    opened: OpenedKNNLM,
    documents: Sequence[TokenizedDocument],
    *,
    k: int | None = None,
    cache: Path | None = None,
    batch_tokens: int = 2048,
    progress: Callable[[int], None] = lambda done: None,
) -> Calibration:
    """Search each token's ``k`` neighbours once (None: 1024, or all entries where there are fewer) and fit k, T and λ.

    ``cache``: a folder for what was found, which is used again (None: deleted afterwards). ``progress`` is called with the
    number of tokens read. Raises :class:`CorpusError` and :class:`StoreMismatch` as
    :func:`~knnlm.evaluation.neighbor_cache.fill_cache`.
    """
    neighbors = k if k is not None else max(1, min(MOST_NEIGHBORS, opened.store.manifest.live_entries))
    with tempfile.TemporaryDirectory(prefix="knnlm-calibrate-") as folder:
        cached = fill_cache(cache or folder, opened, documents, neighbors, batch_tokens=batch_tokens, progress=progress)
        return Calibration(fit_mixture(cached), cached.tokens, len(documents))


def profile_of(opened: OpenedKNNLM, calibration: Calibration, source: str) -> Profile:
    """The profile of a calibration; ``source`` says on what text."""
    distance = opened.retriever.distance
    belongs = profile_facts(opened.store, opened.model.dtype, opened.retriever.index)
    return Profile(calibration.fit.mixture, distance, source, belongs, calibration.measured())
