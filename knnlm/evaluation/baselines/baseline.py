"""A baseline on its own and mixed with the base LM, in the rows of ``compare``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from knnlm.errors import InvalidInput
from knnlm.evaluation.mixture_fit import best_weight, mixed_log_probs

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class BaselineWeight:
    """λ of a baseline beside the base LM, 0 to 1, and where it comes from: ``fixed``, or ``validation text``."""

    value: float
    source: str = "fixed"

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise InvalidInput("baseline weight", f"is {self.value}, but must be from 0 to 1.")


@dataclass(frozen=True)
class Baseline:
    """One baseline over the tokens of a comparison.

    ``name`` and ``settings`` say what it is. ``alone`` and ``mixed`` [tokens] float32, natural logarithms, in the order of
    ``compare``: the baseline's own log-probability of each token (-inf: none; NaN: it has nothing to say there), and
    log(λ p_baseline + (1-λ) p_LM), the base LM's where it has nothing to say.
    """

    name: str
    settings: dict[str, Any]
    weight: BaselineWeight
    alone: FloatArray
    mixed: FloatArray


def mixed_with_lm(name: str, settings: dict[str, Any], alone: FloatArray, lm: FloatArray, weight: BaselineWeight) -> Baseline:
    """The baseline of log-probabilities ``alone`` [tokens] beside those of the base LM, ``lm`` [tokens]."""
    mixed = mixed_log_probs(lm.astype(np.float64), alone.astype(np.float64), weight.value)
    return Baseline(name, settings, weight, alone, mixed.astype(np.float32))


def fit_weight(alone: FloatArray, lm: FloatArray) -> BaselineWeight:
    """The λ of the highest likelihood of a validation text: log-probabilities of its tokens by the baseline and by the LM,
    each [tokens]. Never of the text that is reported."""
    weight, _ = best_weight(lm.astype(np.float64), alone.astype(np.float64))
    return BaselineWeight(weight, "validation text")
