"""Texts that are scored beside the decoding: one batch of windows a step; tenants take turns, and so do the texts of one."""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.evaluation.scoring import ScoredBatch, score
from knnlm.knn_lm import KNNLanguageModel
from knnlm.windows import Windowing
from knnlm_server.errors import EngineFailed, QueueFull
from knnlm_server.queue_shares import share_of
from knnlm_server.sequence import Limits, ScoreRequest, ScoreResult
from knnlm_server.served_stores import ChosenStores

SCORE_BATCH_TOKENS = 1024
_SCORED = ("log_probs", "lm_log_probs", "knn_log_probs")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Scoring:
    request: ScoreRequest
    batches: Iterator[ScoredBatch]
    result: dict[str, Tensor]
    stores: ChosenStores  # held until the end: what is removed from them is looked for as long as somebody does


class Scorings:
    """Texts that wait to be scored. An error of one ends that one alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # By tenant, the one whose turn it is first; no tenant is without a text.
        self._texts: OrderedDict[str, deque[_Scoring]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._texts)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def tokens(self) -> int:
        """Of all texts that wait or are half scored."""
        return sum(len(scoring.request.tokens) for scoring in self._waiting)

    @property
    def _waiting(self) -> list[_Scoring]:
        return [scoring for texts in self._texts.values() for scoring in texts]

    @property
    def request_ids(self) -> list[str]:
        """Of all that wait."""
        return [scoring.request.request_id for scoring in self._waiting]

    def add(self, request: ScoreRequest, knn_lm: KNNLanguageModel, windowing: Windowing, stores: ChosenStores) -> None:
        """Queue a text; its windows are those in which ``windowing`` cuts a document, and ``stores`` its datastores. ``knn_lm``
        mixes as the request asks.

        Raises :class:`QueueFull` with the numbers where the texts beside it are too long already.
        """
        self._check_room(request)
        tokens = torch.tensor(request.tokens, dtype=torch.int32).numpy()
        batches = score(knn_lm, [tokens], windowing, batch_tokens=SCORE_BATCH_TOKENS)
        count = max(len(tokens) - 1, 0)
        self._queue(_Scoring(request, batches, {name: torch.empty(count) for name in _SCORED}, stores))

    def cancel(self, request_id: str) -> None:
        """Forget a text; unknown ids are done already."""
        for scoring in self._waiting:
            if scoring.request.request_id == request_id:
                self._take_out(scoring)

    def clear(self) -> None:
        """Forget all."""
        self._texts.clear()

    def step(self) -> tuple[str, ScoreResult | EngineFailed] | None:
        """One batch of windows of the text whose turn it is; its request's id and result where that was the last."""
        if not self:
            return None
        tenant, texts = next(iter(self._texts.items()))
        scoring = texts[0]
        self._texts.move_to_end(tenant)  # whether or not the text ends here, the next turn is another's
        self._take_out(scoring)
        request_id = scoring.request.request_id
        try:
            batch = next(scoring.batches, None)
            if batch is not None:
                for name, values in scoring.result.items():
                    values[batch.rows] = getattr(batch, name)
        except Exception as error:  # it ends this request alone
            logger.exception("request %s failed", request_id)
            return request_id, EngineFailed.of(error)
        if batch is None:
            return request_id, ScoreResult(**{name: tuple(values.tolist()) for name, values in scoring.result.items()})
        self._queue(scoring)
        return None

    def _check_room(self, request: ScoreRequest) -> None:
        """A single text is always taken, of a tenant that has none too as far as there is room."""
        total, most = len(request.tokens) + self.tokens, self._limits.max_waiting_tokens
        if self and total > most:
            raise QueueFull(f"{total} tokens would be waiting to be scored, the limit is {most}; try again later.")
        tenant, texts = request.tenant, self._texts.get(request.tenant, ())
        own, most = len(request.tokens) + sum(len(scoring.request.tokens) for scoring in texts), share_of(most, tenant)
        if texts and own > most:
            raise QueueFull(
                f"{own} tokens of {tenant!r} would be waiting to be scored, the limit for one caller is {most}; try again later."
            )

    def _queue(self, scoring: _Scoring) -> None:
        self._texts.setdefault(scoring.request.tenant, deque()).append(scoring)

    def _take_out(self, scoring: _Scoring) -> None:
        tenant = scoring.request.tenant
        self._texts[tenant].remove(scoring)
        if not self._texts[tenant]:
            del self._texts[tenant]
