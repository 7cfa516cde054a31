"""From scores to tokens, for many rows at once: temperature, truncation, and one uniform number for each row. Pure.

The processors are those of transformers, but for that of top_p. Every operation treats each row by itself, so a row's token
is the same, bit for bit, whatever else is in the batch (sums along rows of a batch are not: they are split by its size).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TypicalLogitsWarper

from knnlm.errors import ModelError
from knnlm.penalties import allowed_scores
from knnlm.sampling import SamplingParams

SHORTLIST = 1024
"""The nucleus of top_p is looked for among so many most probable tokens first: sorting a vocabulary takes long."""
NOTHING_TO_DRAW = "No token can be drawn: the model's log-probabilities are NaN or all -inf; look at its weights and its dtype."
_NO_IDS = cast("torch.LongTensor", None)  # that which truncates looks at scores alone


def sample(
    log_probs: Tensor, params: SamplingParams, tokens: Sequence[int], uniform: float, *, generated: int = 0, base: Tensor | None = None
) -> int:
    """The next token id of one row, as :func:`draw` draws it for many.

    ``log_probs`` [vocabulary] float, normalised, and ``base`` those of the base LM alone, which speaks where bad words
    leave nothing of ``log_probs`` (None: the same). ``tokens``: those of prompt and completion so far, of which the last
    ``generated`` are the completion. Raises :class:`~knnlm.errors.ModelError` where no token can be drawn.
    """
    scores = allowed_scores(log_probs, log_probs if base is None else base, params, tokens, generated, ends=())
    drawn = int(draw(scores[None], params, torch.tensor([uniform], dtype=torch.float64))[0])
    if drawn < 0:
        raise ModelError(NOTHING_TO_DRAW)
    return drawn


def draw(scores: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """A token for each row: [n] int64; -1 for a row with NaN or without any possible token.

    ``scores`` [n, vocabulary], log-probabilities but for a constant; ``uniforms`` [n] float64 in [0, 1): the token is the
    first, in order of token id, at which the cumulative probability (summed in float64) exceeds the number. Temperature 0
    takes the token of the largest score, the smallest id among equals.
    """
    if params.temperature == 0.0:
        best = scores.argmax(-1)
        return torch.where(scores.gather(1, best[:, None])[:, 0] > -torch.inf, best, -1)
    if params.temperature != 1.0:
        scores = TemperatureLogitsWarper(float(params.temperature))(_NO_IDS, scores)
    short = _shortlist(scores, params)
    if short is None:
        return _pick(truncate(scores, params), uniforms)
    ids, values, sure = short
    columns = _pick(_truncate_further(values, params), uniforms)
    tokens = torch.where(columns >= 0, ids.gather(1, columns.clamp(min=0)[:, None])[:, 0], -1)
    rest = (~sure).nonzero()[:, 0]
    if len(rest):
        tokens[rest] = _pick(truncate(scores[rest], params), uniforms[rest])
    return tokens


def truncate(scores: Tensor, params: SamplingParams) -> Tensor:
    """``scores`` [n, vocabulary] after top_k, top_p, min_p and typical_p: -inf for tokens that can't be drawn."""
    if params.top_k:
        scores = TopKLogitsWarper(top_k=min(params.top_k, scores.shape[-1]))(_NO_IDS, scores)
    if params.top_p < 1.0:
        scores = _nucleus(scores, params.top_p)
    return _truncate_further(scores, params)


def _truncate_further(scores: Tensor, params: SamplingParams) -> Tensor:
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(min_p=float(params.min_p))(_NO_IDS, scores)
    if params.typical_p < 1.0:
        typical = cast("Callable[[Any, Tensor], Tensor]", TypicalLogitsWarper(mass=float(params.typical_p)))
        # It sums along rows, so each comes alone; all of them at once take as long, since most of it is sorting.
        scores = torch.cat([typical(None, row) for row in scores.split(1)])
    return scores


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """``scores`` [n, m] with -inf for tokens before which more probable ones reach ``top_p``.

    It is what ``TopPLogitsWarper`` keeps, but for tokens of one probability, which stay or go together here. NumPy sorts
    numbers alone several times faster than torch sorts them with their places.
    """
    values = torch.from_numpy(np.sort(scores.numpy(), axis=1)).flip(1)
    return scores.masked_fill(scores < _edge(values, values.softmax(-1), top_p), -torch.inf)


def _edge(values: Tensor, probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest score that is in the nucleus: [n, 1]. ``values`` and their ``probabilities`` [n, m] descend."""
    reached = probabilities.cumsum(1, dtype=torch.float64)
    kept = (reached - probabilities < top_p).sum(1, keepdim=True)
    return values.gather(1, (kept - 1).clamp(min=0))


def _shortlist(scores: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor] | None:
    """What top_k and top_p leave, without a look at every token; None where it can't be had by that.

    Ids [n, m], ascending; their scores [n, m], -inf for those that are out; and for which rows [n] no other token is in.
    """
    vocabulary = scores.shape[1]
    if 0 < params.top_k < vocabulary:
        values, ids = scores.topk(params.top_k + 1)
        # Tokens that are as probable as the last one belong to it, unless they are impossible.
        sure = (values[:, -2] > values[:, -1]) | (values[:, -1] == -torch.inf)
        values, ids = values[:, :-1], ids[:, :-1]
        if params.top_p < 1.0:
            values = _nucleus(values, params.top_p)
    elif params.top_p < 1.0 and vocabulary > 8 * SHORTLIST:
        values, ids = scores.topk(SHORTLIST)
        edge = _edge(values, scores.log_softmax(-1).gather(1, ids).exp(), params.top_p)
        sure = edge[:, 0] > values[:, -1]
        values = values.masked_fill(values < edge, -torch.inf)
    else:
        return None
    ids, order = ids.sort(dim=1)
    return ids, values.gather(1, order), sure


def _pick(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Columns that are drawn: [n] int64; -1 for a row with NaN or without any possible one."""
    cumulative = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    # A product that was rounded up to the total finds nothing; the last column that adds to it is meant.
    drawn = torch.minimum(drawn, torch.searchsorted(cumulative, total))
    return torch.where(total > 0, drawn, -1)[:, 0]
