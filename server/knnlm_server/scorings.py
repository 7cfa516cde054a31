"""Texts that are scored beside the decoding: one batch of windows a step, in turns."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from knnlm.evaluation.scoring import ScoredBatch, score
from knnlm.knn_lm import KNNLanguageModel
from knnlm.windows import Windowing
from knnlm_server.errors import EngineFailed, QueueFull
from knnlm_server.sequence import Limits, ScoreRequest, ScoreResult
from knnlm_server.served_stores import ChosenStores

SCORE_BATCH_TOKENS = 1024
_SCORED = ("log_probs", "lm_log_probs", "knn_log_probs")

logger = logging.getLogger(__name__)


@dataclass
class _Scoring:
    request: ScoreRequest
    batches: Iterator[ScoredBatch]
    result: dict[str, Tensor]
    stores: ChosenStores  # held until the end: what is removed from them is looked for as long as somebody does


class Scorings:
    """Texts that wait to be scored. An error of one ends that one alone."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waiting: deque[_Scoring] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def request_ids(self) -> list[str]:
        """Of all that wait."""
        return [scoring.request.request_id for scoring in self._waiting]

    def add(self, request: ScoreRequest, knn_lm: KNNLanguageModel, windowing: Windowing, stores: ChosenStores) -> None:
        """Queue a text; its windows are those in which ``windowing`` cuts a document, and ``stores`` its datastores. ``knn_lm``
        mixes as the request asks.

        Raises :class:`QueueFull` with the numbers where the texts beside it are too long already.
        """
        total = len(request.tokens) + sum(len(scoring.request.tokens) for scoring in self._waiting)
        most = self._limits.max_waiting_tokens
        if self._waiting and total > most:
            raise QueueFull(f"{total} tokens would be waiting to be scored, the limit is {most}; try again later.")
        tokens = torch.tensor(request.tokens, dtype=torch.int32).numpy()
        batches = score(knn_lm, [tokens], windowing, batch_tokens=SCORE_BATCH_TOKENS)
        count = max(len(tokens) - 1, 0)
        self._waiting.append(_Scoring(request, batches, {name: torch.empty(count) for name in _SCORED}, stores))

    def cancel(self, request_id: str) -> None:
        """Forget a text; unknown ids are done already."""
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)

    def clear(self) -> None:
        """Forget all."""
        self._waiting.clear()

    def step(self) -> tuple[str, ScoreResult | EngineFailed] | None:
        """One batch of windows of the text whose turn it is; its request's id and result where that was the last."""
        if not self._waiting:
            return None
        scoring = self._waiting.popleft()
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
        self._waiting.append(scoring)
        return None
