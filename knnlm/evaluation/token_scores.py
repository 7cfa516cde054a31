"""One pass of LM, search and mixing over a text, gathered into an array for each figure of a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.evaluation.best_tokens import best_tokens
from knnlm.evaluation.scoring import ReadBatch, ScoredBatch, score
from knnlm.knn_lm import KNNLanguageModel
from knnlm.mixture import Mixture
from knnlm.neighbors import Neighbors
from knnlm.tokenized import TokenizedDocument
from knnlm.windows import Windowing

NEAREST = 3
"""Neighbours that are kept for each token, to show what was near."""

_KINDS: dict[str, Any] = {
    "lm_logprob": np.float32,
    "knn_logprob": np.float32,
    "logprob": np.float32,
    "weight": np.float32,
    "searched": np.bool_,
    "nearest": np.float32,
    "lm_best": np.int32,
    "lm_best_logprob": np.float32,
    "best": np.int32,
    "best_logprob": np.float32,
    "supporter": np.int64,
}


@dataclass
class Seconds:
    """Wall time of forward passes, of searches with re-ranking, and of mixing."""

    forward: float = 0.0
    search: float = 0.0
    mixing: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.search + self.mixing

    def add(self, batch: ScoredBatch) -> None:
        """Add a batch's."""
        self.forward += batch.lm_seconds
        self.search += batch.search_seconds
        self.mixing += batch.mix_seconds


@dataclass(frozen=True)
class TokenScores:
    """``columns`` by the names of :class:`~knnlm.evaluation.comparison.PerToken`, each with a row for each scored token."""

    columns: dict[str, np.ndarray[Any, Any]]
    seconds: Seconds = field(default_factory=Seconds)


def score_tokens(
    knn_lm: KNNLanguageModel,
    text: Sequence[TokenizedDocument],
    windowing: Windowing,
    mixture: Mixture | None,
    *,
    batch_tokens: int,
    progress: Callable[[int], None],
    watch: Callable[[ReadBatch], None] = lambda batch: None,
) -> TokenScores:
    """Score every token but the first of each document, with ``mixture`` or, for None, that of ``knn_lm`` and its gate.

    ``watch`` sees each batch as the LM read it.
    """
    scores, temperature = TokenScores(_places(text)), (mixture or knn_lm.mixture).temperature
    done = 0
    for batch in score(knn_lm, (document.ids for document in text), windowing, mixture, batch_tokens=batch_tokens):
        rows = batch.rows.numpy()
        for name, values in _values(batch, temperature).items():
            scores.columns[name][rows] = values.numpy()
        scores.seconds.add(batch)
        watch(batch.read)
        done += len(rows)
        progress(done)
    return scores


def _places(text: Sequence[TokenizedDocument]) -> dict[str, np.ndarray[Any, Any]]:
    """Where each scored token stands, and room for what is said of it."""
    lengths = [len(document.ids) for document in text]
    counts = [max(n - 1, 0) for n in lengths]
    n = sum(counts)
    return {
        "doc": np.repeat(np.arange(len(text), dtype=np.int32), counts),
        "position": np.concatenate([np.arange(1, n, dtype=np.int64) for n in lengths]),
        "token_id": np.concatenate([document.ids[1:] for document in text]),
        **{name: np.empty(n, kind) for name, kind in _KINDS.items()},
        "neighbor_ids": np.empty((n, NEAREST), np.int64),
    }


def _values(batch: ScoredBatch, temperature: float) -> dict[str, Tensor]:
    best = best_tokens(batch.read.log_probs, batch.neighbors, temperature, batch.weight)
    return {
        "lm_logprob": batch.lm_log_probs,
        "knn_logprob": batch.knn_log_probs,
        "logprob": batch.log_probs,
        "weight": batch.weight,
        "searched": batch.searched,
        "lm_best": best.lm,
        "lm_best_logprob": best.lm_log_probs,
        "best": best.mixed,
        "best_logprob": best.log_probs,
        **_nearest(batch.neighbors, batch.read.targets),
    }


def _nearest(neighbors: Neighbors, targets: Tensor) -> dict[str, Tensor]:
    """What is kept of the neighbours [n, k], which are sorted by distance."""
    n, k = neighbors.ids.shape
    ids = torch.nn.functional.pad(neighbors.ids[:, :NEAREST], (0, max(0, NEAREST - k)), value=-1)
    if k == 0:
        return {"nearest": torch.full((n,), torch.inf), "neighbor_ids": ids, "supporter": torch.full((n,), -1)}
    has_target = (neighbors.tokens == targets[:, None]) & neighbors.found
    # The first of equals is the nearest one.
    first = has_target.int().argmax(1)
    supporter = torch.where(has_target.any(1), neighbors.ids.gather(1, first[:, None])[:, 0], -1)
    return {"nearest": neighbors.distances[:, 0], "neighbor_ids": ids, "supporter": supporter}
