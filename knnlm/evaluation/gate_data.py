"""What a gate learns from: features, log-probabilities and groups of the tokens of a neighbour cache, for one k and T.

The features are those of serving, made by the same function. No model, no index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knnlm.distribution import neighbor_token_log_probs
from knnlm.evaluation.mixture_fit import ROWS_AT_ONCE, mixed_log_probs, target_log_probs
from knnlm.evaluation.neighbor_cache import CachedTokens, NeighborCache
from knnlm.evaluation.statistics import FEWEST_DOCUMENT_CLUSTERS
from knnlm.gate import LM_FEATURES, LMSummary, gate_features
from knnlm.neighbors import Neighbors

TOKENS_OF_GROUP = 1024

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class GateData:
    """Tokens of a text, n of them: ``features`` [n, len(FEATURES)] float64; ``lm`` and ``knn`` [n] float64, log-probabilities of
    the targets (NaN in ``knn``: no neighbour, the LM alone); ``document`` and ``position`` [n]."""

    features: Tensor
    lm: Array
    knn: Array
    document: Array
    position: Array

    def __len__(self) -> int:
        return len(self.lm)

    @property
    def lm_features(self) -> Tensor:
        """Those that are known before a search: [n, len(LM_FEATURES)]."""
        return self.features[:, : len(LM_FEATURES)]

    def log_probs(self, weights: Array | float) -> Array:
        """log(λ p_kNN + (1-λ) p_LM) [n] for λ ``weights``."""
        return mixed_log_probs(self.lm, self.knn, weights)

    @property
    def groups(self) -> Array:
        """What may not be split between fitting and judging, [n, 2]: the document, and in it the stretch of 1,024 tokens
        (0 where the text has 20 documents or more)."""
        few = len(np.unique(self.document)) < FEWEST_DOCUMENT_CLUSTERS
        stretch = self.position // TOKENS_OF_GROUP if few else np.zeros(len(self), np.int64)
        return np.stack([self.document, stretch], axis=1)

    def rows(self, chosen: Array) -> GateData:
        """Some of the tokens; ``chosen`` [n] bool, or their numbers."""
        arrays = (self.lm[chosen], self.knn[chosen], self.document[chosen], self.position[chosen])
        return GateData(self.features[torch.from_numpy(chosen)], *arrays)

    @staticmethod
    def joined(parts: Sequence[GateData]) -> GateData:
        """One after the other."""
        arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ("lm", "knn", "document", "position")]
        return GateData(torch.cat([part.features for part in parts]), *arrays)


def gate_data(cache: NeighborCache, k: int, temperature: float) -> GateData:
    """Of all tokens of ``cache`` with their first ``k`` neighbours."""
    return GateData.joined([_of_part(part, k, temperature) for part in cache.parts()])


def _of_part(part: CachedTokens, k: int, temperature: float) -> GateData:
    lm, knn = np.array(part.lm_log_prob, np.float64), target_log_probs(part, [k], temperature)[0]
    return GateData(cached_features(part, k, temperature), lm, knn, np.array(part.document), np.array(part.position))


def cached_features(part: CachedTokens, k: int, temperature: float) -> Tensor:
    """:func:`knnlm.gate.gate_features` of each token of ``part`` with its first ``k`` neighbours: [n, len(FEATURES)] float64."""
    return torch.cat([_features(part, slice(start, start + ROWS_AT_ONCE), k, temperature) for start in range(0, len(part), ROWS_AT_ONCE)])


def _features(part: CachedTokens, rows: slice, k: int, temperature: float) -> Tensor:
    neighbors = Neighbors(_tensor(part.distances[rows, :k]), _tensor(part.tokens[rows, :k]).long(), _tensor(part.ids[rows, :k]))
    lm = LMSummary(_tensor(part.lm_entropy[rows]), _tensor(part.lm_max_log_prob[rows]), _tensor(part.lm_argmax[rows]).long())
    votes = neighbor_token_log_probs(neighbors, temperature)
    followed = _tensor(part.followed[rows, :k]).max(1).values
    return gate_features(lm, neighbors, votes, _tensor(part.neighbor_lm_log_probs[rows, :k]), followed)


def _tensor(array: Array) -> Tensor:
    """A copy, since a cache is mapped and read-only."""
    return torch.from_numpy(np.array(array))
