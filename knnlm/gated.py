"""λ of each row of a batch: the one that was asked for, or what the gate of the row's datastore gives.

A gate looks twice: before the search at the LM alone, which says whose neighbours are worth one, and after it at what was
found. Serving and evaluation both ask here; nothing is computed for rows without a gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from knnlm.datastore.reader import Datastore
from knnlm.following import followed_lengths
from knnlm.gate import Gate, LMSummary, gate_features, lm_features
from knnlm.interpolation import effective_weight
from knnlm.neighbors import Neighbors


@dataclass(frozen=True)
class StoreGate:
    """A datastore's gate, and the datastore, in whose documents neighbours are followed."""

    gate: Gate
    store: Datastore


@dataclass(frozen=True)
class GatedRows:
    """Rows of a batch that have one gate: ``rows`` [m] int64, their places, ascending; ``contexts`` [m, 16] int64, the last
    tokens that the LM has read, the newest last, -1 where there are no more."""

    gate: StoreGate
    rows: Tensor
    contexts: Tensor


class RowWeights:
    """λ of the rows of one batch.

    ``asked`` [n] float64: what rows without a gate have. ``lm_log_probs`` [n, vocabulary] is read where there are ``gated``
    rows. ``searched`` [n] bool: rows whose neighbours are wanted; of the others, the base LM's distribution stays as it is.
    """

    def __init__(self, asked: Tensor, lm_log_probs: Tensor | None = None, gated: Sequence[GatedRows] = ()) -> None:
        self._asked, self._lm_log_probs, self._parts = asked, lm_log_probs, []
        self.searched = asked > 0
        for part in gated:
            assert lm_log_probs is not None
            seen = LMSummary.of(lm_log_probs if len(part.rows) == len(asked) else lm_log_probs[part.rows])
            self.searched[part.rows] = ~part.gate.gate.skips(lm_features(seen))
            self._parts.append((part, seen))

    @property
    def gated(self) -> bool:
        """Whether any row has a gate, so that :meth:`of` looks at votes."""
        return bool(self._parts)

    def of(self, neighbors: Neighbors, votes: Tensor | None) -> Tensor:
        """λ of each row [n] float64, with the ``neighbors`` that it found and the ``votes`` [n, k] for their tokens (None will
        do without gates). 0 where there is no neighbour: there the base LM speaks alone."""
        found = neighbors.found
        weights = effective_weight(self._asked, found)
        any_found = found.any(1)
        for part, seen in self._parts:
            assert votes is not None
            weights[part.rows] = 0.0
            # Of the part's rows those that have something to look at, and where they stand in the batch.
            own = any_found[part.rows].nonzero()[:, 0]
            if len(own):
                weights[part.rows[own]] = self._looked_at(part, seen, own, neighbors, votes)
        return weights

    def _looked_at(self, part: GatedRows, seen: LMSummary, own: Tensor, neighbors: Neighbors, votes: Tensor) -> Tensor:
        assert self._lm_log_probs is not None
        rows = part.rows[own]
        theirs = neighbors.each(lambda values: values[rows])
        features = gate_features(
            LMSummary(seen.entropy[own], seen.max_log_prob[own], seen.best[own]),
            theirs,
            votes[rows],
            self._lm_log_probs[rows[:, None], theirs.tokens],
            followed_lengths(part.contexts[own], theirs, part.gate.store),
        )
        return part.gate.gate.weights(features)
