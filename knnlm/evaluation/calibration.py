"""``calibrate``: the mixture and the gate that fit a text best, from one pass of LM and search, as the datastore's profile.

k, T and λ are fitted on the validation text alone. The gate, for that k and T, sees shuffled contexts of it and other text
beside it, so that it knows a datastore that is of no use.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.datastore.profile import Profile
from knnlm.errors import CorpusError
from knnlm.evaluation.comparison import Overlap
from knnlm.evaluation.gate_choice import GateChoice, choose_gate
from knnlm.evaluation.gate_data import gate_data
from knnlm.evaluation.leakage import overlap_with
from knnlm.evaluation.mixture_fit import Fit, fit_mixture
from knnlm.evaluation.neighbor_cache import NeighborCache, fill_cache
from knnlm.opening import OpenedKNNLM, profile_facts
from knnlm.tokenized import TokenizedDocument

MOST_NEIGHBORS = 1024
SHUFFLED_SHARE = 0.2

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` found over ``tokens`` of a text; perplexities of base LM and best fixed mixture on that very text,
    which the mixture was chosen for. ``choice``: the gate and what it was judged by (None: the text is too short for any).
    ``overlap``: what of the text stands in the datastore; much of it, and the mixture is made for text that is known by heart."""

    fit: Fit
    tokens: int
    documents: int
    overlap: Overlap
    choice: GateChoice | None = None

    @property
    def base_perplexity(self) -> float:
        """Of the base LM."""
        return math.exp(self.fit.base_loss)

    @property
    def perplexity(self) -> float:
        """Of the best fixed mixture."""
        return math.exp(self.fit.loss)

    def measured(self) -> dict[str, Any]:
        """For the profile: what was measured, and the surface of all settings looked at."""
        return {
            "tokens": self.tokens,
            "base_perplexity": self.base_perplexity,
            "perplexity": self.perplexity,
            "overlap": self.overlap.share,
            "gate": None if self.choice is None else self.choice.measured(),
            "surface": [[point.k, point.temperature, point.weight, point.loss] for point in self.fit.surface],
        }


def calibrate(
    opened: OpenedKNNLM,
    documents: Sequence[TokenizedDocument],
    negatives: Mapping[str, Sequence[TokenizedDocument]] | None = None,
    *,
    k: int | None = None,
    cache: Path | None = None,
    batch_tokens: int = 2048,
    progress: Progress = lambda stage, done, total: None,
) -> Calibration:
    """Search each token's ``k`` neighbours once (None: 1024, or all entries where there are fewer), fit k, T and λ, then a gate.

    ``negatives``: texts, by name, for which the datastore is of no use. ``cache``: a folder for what was found, which is used
    again (None: deleted afterwards). ``progress`` is told the stage, and how many of its tokens are read. Raises
    :class:`CorpusError` and :class:`StoreMismatch` as :func:`~knnlm.evaluation.neighbor_cache.fill_cache`.
    """
    for name, held in {"": documents, **(negatives or {})}.items():
        if all(len(document.ids) < 2 for document in held):
            where = f" in {name}" if name else ""
            raise CorpusError(f"There is nothing to score{where}: no document has at least two tokens.")
    neighbors = k if k is not None else max(1, min(MOST_NEIGHBORS, opened.store.manifest.live_entries))

    def filled(folder: Path, stage: str, held: Sequence[TokenizedDocument], shuffled: bool = False) -> NeighborCache:
        total = sum(max(len(document.ids) - 1, 0) for document in held)
        return fill_cache(
            folder,
            opened,
            held,
            neighbors,
            shuffled=shuffled,
            batch_tokens=batch_tokens,
            progress=lambda done: progress(stage, done, total),
        )

    with tempfile.TemporaryDirectory(prefix="knnlm-calibrate-") as temporary:
        folder = cache or Path(temporary)
        whole = filled(folder, "searching", documents)
        shuffled = filled(folder / "shuffled", "shuffled contexts", _first_share(documents), shuffled=True)
        others = {
            name: filled(folder / f"negative-{number:02}", "other text", held)
            for number, (name, held) in enumerate((negatives or {}).items())
        }
        fit = fit_mixture(whole)
        setting = (fit.mixture.k, fit.mixture.temperature)
        others_data = {name: gate_data(other, *setting) for name, other in others.items()}
        choice = choose_gate(gate_data(whole, *setting), gate_data(shuffled, *setting), others_data)
        return Calibration(fit, whole.tokens, len(documents), overlap_with(opened.store, documents), choice)


def _first_share(documents: Sequence[TokenizedDocument]) -> list[TokenizedDocument]:
    """The first documents, until they hold a fifth of the tokens to be predicted."""
    wanted = SHUFFLED_SHARE * sum(max(len(document.ids) - 1, 0) for document in documents)
    chosen: list[TokenizedDocument] = []
    held = 0
    for document in documents:
        chosen.append(document)
        held += max(len(document.ids) - 1, 0)
        if held >= wanted:
            break
    return chosen


def profile_of(opened: OpenedKNNLM, calibration: Calibration, source: str) -> Profile:
    """The profile of a calibration; ``source`` says on what text."""
    distance = opened.retriever.distance
    belongs = profile_facts(opened.store, opened.model.dtype, opened.retriever.index)
    gate = None if calibration.choice is None else calibration.choice.gate
    return Profile(calibration.fit.mixture, distance, source, belongs, calibration.measured(), gate)
