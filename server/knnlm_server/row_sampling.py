"""The tokens of all rows of a step at once. A row's token is what it would be alone, and so is its error."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.drawing import NOTHING_TO_DRAW, draw
from knnlm.errors import ModelError
from knnlm.penalties import allowed_scores
from knnlm.sampling import SamplingParams

ROWS_AT_ONCE = 8
"""Tensors of more rows cost more to allocate than they save; the most probable token needs none."""


@dataclass(frozen=True)
class RowDraw:
    """What one row's draw depends on beside its log-probabilities.

    ``tokens``: prompt and completion so far, of which the last ``generated`` are the completion. ``ends``: tokens that
    can't be drawn, since they would end the completion too early. ``uniform``: the number in [0, 1) that decides.
    """

    params: SamplingParams
    tokens: Sequence[int]
    generated: int
    uniform: float
    ends: Collection[int] = ()

    @property
    def plain(self) -> bool:
        """Whether the text so far has no say."""
        p = self.params
        penalized = p.repetition_penalty != 1.0 or p.frequency_penalty != 0.0 or p.presence_penalty != 0.0
        return not (penalized or p.logit_bias or p.bad_words or self.ends)

    @property
    def truncation(self) -> SamplingParams:
        """The settings that rows must share to be drawn together."""
        p = self.params
        if p.temperature == 0.0:
            return SamplingParams(temperature=0.0)
        return SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, typical_p=p.typical_p)


def draw_rows(log_probs: Tensor, base: Tensor, rows: Sequence[RowDraw]) -> list[int | Exception]:
    """A token id for each of ``rows``, or what went wrong with it.

    ``log_probs`` [n, vocabulary] of the mixture and ``base`` [n, vocabulary] of the base LM, both normalised. Rows whose
    text has no say, and that draw in the same way, are drawn in one piece.
    """
    drawn: list[int | Exception] = [ModelError(NOTHING_TO_DRAW)] * len(rows)
    groups: dict[SamplingParams, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.truncation, []).append(number)
    for params, members in groups.items():
        at_once = len(members) if params.temperature == 0.0 else ROWS_AT_ONCE
        for first in range(0, len(members), at_once):
            numbers = members[first : first + at_once]
            for number, token in zip(numbers, _draw_group(log_probs, base, rows, params, numbers), strict=True):
                drawn[number] = token
    return drawn


def _draw_group(
    log_probs: Tensor, base: Tensor, rows: Sequence[RowDraw], params: SamplingParams, numbers: Sequence[int]
) -> list[int | Exception]:
    """Tokens of the rows ``numbers``, which share ``params``; row by row where one of them breaks the others' draw."""
    try:
        scores = _scores(log_probs, base, rows, numbers)
        uniforms = torch.tensor([rows[number].uniform for number in numbers], dtype=torch.float64)
        tokens = draw(scores, params, uniforms).tolist()
    except Exception as error:  # whatever goes wrong with one row ends that request alone
        if len(numbers) == 1:
            return [error]
        return [drawn for number in numbers for drawn in _draw_group(log_probs, base, rows, params, [number])]
    return [token if token >= 0 else ModelError(NOTHING_TO_DRAW) for token in tokens]


def _scores(log_probs: Tensor, base: Tensor, rows: Sequence[RowDraw], numbers: Sequence[int]) -> Tensor:
    """Scores of the rows ``numbers`` before temperature: [len(numbers), vocabulary]."""
    first, last = numbers[0], numbers[-1]
    together = last - first + 1 == len(numbers)
    if together and all(rows[number].plain for number in numbers):
        return log_probs[first : last + 1]
    scores = log_probs[list(numbers)]
    for place, number in enumerate(numbers):
        row = rows[number]
        if not row.plain:
            scores[place] = allowed_scores(log_probs[number], base[number], row.params, row.tokens, row.generated, row.ends)
    return scores
