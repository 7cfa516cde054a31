"""Which gate a datastore's profile gets: the form that is best on held-out documents, if it beats the best fixed λ there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from knnlm.evaluation.gate_data import GateData
from knnlm.evaluation.gate_fit import (
    HIDDEN,
    NEGATIVE_SHARES,
    Fitted,
    Lesson,
    best_floor,
    buckets_held_out,
    fixed_held_out,
    lesson,
    network_held_out,
)
from knnlm.evaluation.mixture_fit import best_weight
from knnlm.evaluation.skip_fit import SkipPoint, fit_skip_rule
from knnlm.evaluation.statistics import Clusters, standard_error
from knnlm.gate import Gate

SHUFFLED = "shuffled contexts"
NO_REGRET = 0.005

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Judged:
    """A way to choose λ, on documents that it was not fitted to: perplexity and its standard error, and the relative change from
    the ``beside`` that it is judged against (below 0: better), with the standard error of the paired difference."""

    name: str
    detail: str
    perplexity: float
    standard_error: float
    change: float
    change_standard_error: float


@dataclass(frozen=True)
class GateChoice:
    """What was tried and what was chosen.

    ``base`` and ``fixed`` (the best λ of the other documents), and ``forms``: on the validation text; changes are from
    ``fixed``. ``negatives``: the chosen gate on text that the datastore is of no use for; changes are from the base LM.
    ``negative_share``: how much of what counted they were, the smallest of some shares at which none of them is harmed.
    ``gate`` None: no form beats the fixed λ, ``chosen`` is the best of them all the same. ``zeros``: share of validation tokens
    with λ 0. ``skip``: the point of the rule that the gate has (None: it has none), ``skip_curve`` what others would give.
    """

    gate: Gate | None
    chosen: str
    negative_share: float
    base: Judged
    fixed: Judged
    forms: tuple[Judged, ...]
    negatives: tuple[Judged, ...]
    zeros: float
    skip: SkipPoint | None
    skip_curve: tuple[SkipPoint, ...]

    def measured(self) -> dict[str, Any]:
        """For a profile, and as JSON: everything but the gate itself; None for a standard error that one cluster can't give."""
        content = asdict(replace(self, gate=None), dict_factory=_finite)
        del content["gate"]
        return {**content, "has_gate": self.gate is not None}


def choose_gate(useful: GateData, shuffled: GateData | None, negatives: Mapping[str, GateData]) -> GateChoice | None:
    """The gate for tokens of a validation text, ``shuffled`` contexts of it, and other texts by name.

    None where the text is too short to hold any of it out: one document of at most 1,024 tokens, or so little more that all
    of it falls into one fold beside the other texts.
    """
    names = ([] if shuffled is None else [SHUFFLED]) + list(negatives)
    start = best_weight(useful.lm, useful.knn)[0]
    candidates: list[_Candidate] = []
    for share in NEGATIVE_SHARES if names else (0.0,):
        taught = lesson(useful, shuffled, list(negatives.values()), share)
        if len(np.unique(taught.fold[taught.useful])) < 2:
            return None
        candidates.append(_candidate(taught, share, start, names))
        if candidates[-1].harmless:
            break
    beating = [one for one in candidates if one.beats]
    # More weight of the negatives makes it safer, and what it gains smaller.
    best = next((one for one in beating if one.harmless), None) or min(beating or candidates, key=lambda one: one.regret)
    skip = fit_skip_rule(best.taught, best.weights)
    nothing = np.zeros_like(best.fixed)
    return GateChoice(
        gate=Gate(best.fitted.form, best.floor, skip.rule) if best.beats else None,
        chosen=best.fitted.name,
        negative_share=best.share,
        base=_judge(best.taught, "base LM", "", nothing, best.fixed, 0),
        fixed=_judge(best.taught, "best fixed weight", f"{start:.3f}", best.fixed, best.fixed, 0),
        forms=best.forms,
        negatives=best.negatives,
        zeros=float((best.weights[best.taught.useful] == 0).mean()),
        skip=skip.chosen if skip.rule is not None else None,
        skip_curve=skip.curve,
    )


@dataclass(frozen=True)
class _Candidate:
    """The best form where negatives count for ``share`` of the whole: with its ``floor``, the λ ``weights`` [n] that it gave held-out
    tokens, those of the ``fixed`` mixture [n], whether it ``beats`` that, and what all ``forms`` and the ``negatives`` were judged."""

    taught: Lesson
    share: float
    fitted: Fitted
    floor: float
    weights: Array
    fixed: Array
    beats: bool
    forms: tuple[Judged, ...]
    negatives: tuple[Judged, ...]

    @property
    def harmless(self) -> bool:
        """Whether no kind of negative text is above the base LM beyond noise: by less than 0.5 %, or a standard error."""
        return all(one.change <= max(NO_REGRET, one.change_standard_error) for one in self.negatives)

    @property
    def regret(self) -> float:
        """The largest change from the base LM on negative text."""
        return max((one.change for one in self.negatives), default=0.0)


def _candidate(taught: Lesson, share: float, start: float, names: Sequence[str]) -> _Candidate:
    fixed = fixed_held_out(taught)
    fitted = [buckets_held_out(taught), *(network_held_out(taught, name, start) for name in HIDDEN)]
    best = min(fitted, key=lambda one: taught.loss(one.held_out))
    floor = best_floor(taught, best.held_out)
    weights = np.where(best.held_out < floor, 0.0, best.held_out)
    won = _judge(taught, best.name, best.detail, weights, fixed, 0)
    return _Candidate(
        taught,
        share,
        best,
        floor,
        weights,
        fixed,
        beats=won.change < -won.change_standard_error,
        forms=tuple(_judge(taught, one.name, one.detail, one.held_out, fixed, 0) for one in fitted),
        negatives=tuple(_judge(taught, name, "", weights, np.zeros_like(fixed), number) for number, name in enumerate(names, 1)),
    )


def _judge(taught: Lesson, name: str, detail: str, weights: Array, beside: Array, part: int) -> Judged:
    """λ ``weights`` against λ ``beside`` [n] on the tokens of a part."""
    rows = taught.part == part
    data = taught.data.rows(rows)
    clusters = Clusters.among(data.document, data.position)
    log_probs, others = data.log_probs(weights[rows]), data.log_probs(beside[rows])
    perplexity, ratio = math.exp(-log_probs.mean()), math.exp((others - log_probs).mean())
    return Judged(
        name,
        detail,
        perplexity,
        perplexity * standard_error(log_probs, clusters),
        ratio - 1,
        ratio * standard_error(others - log_probs, clusters),
    )


def _finite(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in items}
