"""What is told about a token: log-probabilities, alternatives, and the neighbours that voted. Draws nothing, decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from knnlm.distribution import log_weights
from knnlm.knn_lm import Mixed
from knnlm.neighbors import Neighbors
from knnlm.tokenization import TextTokenizer
from knnlm_server.sequence import Alternative, DetailParams, NeighborEvidence, RetrievalParams
from knnlm_server.served_stores import ServedStore


class TokenReporter:
    """Makes the parts of token events that were asked for. ``numbered`` gives the datastore of a number that neighbours have."""

    def __init__(self, tokenizer: TextTokenizer, numbered: Callable[[int], ServedStore]) -> None:
        self._tokenizer, self._numbered = tokenizer, numbered

    def details(self, row: int, token: int, detail: DetailParams, retrieval: RetrievalParams, lm: Tensor, mixed: Mixed) -> dict[str, Any]:
        """Fields of the :class:`~knnlm_server.sequence.TokenEvent` of ``token``, drawn in ``row`` of a step.

        ``lm`` and ``mixed.log_probs`` [rows, vocabulary] are log-probabilities before any processing.
        """
        found: dict[str, Any] = {"token_id": token, "token_text": self._tokenizer.token_text(token)}
        if detail.log_probs:
            found |= self._log_probs(row, token, lm, mixed)
        if detail.alternatives:
            found["alternatives"] = self._alternatives(row, detail, lm, mixed)
        if detail.neighbors:
            found["neighbors"] = self.neighbors(mixed.neighbors.row(row), retrieval.temperature, detail.neighbors)
        return found

    def neighbors(self, found: Neighbors, temperature: float, count: int) -> tuple[NeighborEvidence, ...]:
        """The ``count`` heaviest of one row's neighbours, and where they stand in the corpus."""
        shares = log_weights(found, temperature).exp()[0].tolist()
        heaviest = found.nearest(count)
        if heaviest.stores is None:  # of a row that searched nothing
            return ()
        places = zip(heaviest.stores[0].tolist(), heaviest.ids[0].tolist(), heaviest.distances[0].tolist(), shares, strict=False)
        return tuple(self._evidence(self._numbered(store), entry, distance, share) for store, entry, distance, share in places)

    def _log_probs(self, row: int, token: int, lm: Tensor, mixed: Mixed) -> dict[str, float | None]:
        return {
            "log_prob": float(mixed.log_probs[row, token]),
            "lm_log_prob": float(lm[row, token]),
            "knn_log_prob": mixed.knn_log_prob(row, token) if mixed.searched[row] else None,
            "knn_share": mixed.knn_share(row, token),
            "interpolation_weight": float(mixed.weight[row]),
        }

    def _alternatives(self, row: int, detail: DetailParams, lm: Tensor, mixed: Mixed) -> tuple[Alternative, ...]:
        values, ids = mixed.log_probs[row].topk(min(detail.alternatives, mixed.log_probs.shape[1]))
        return tuple(
            Alternative(
                token, self._tokenizer.token_text(token), value,
                float(lm[row, token]) if detail.log_probs else None,
                mixed.knn_log_prob(row, token) if detail.log_probs and mixed.searched[row] else None,
            )
            for token, value in zip(ids.tolist(), values.tolist(), strict=True)
        )  # fmt: skip

    def _evidence(self, served: ServedStore, entry: int, distance: float, share: float) -> NeighborEvidence:
        origin = served.store.evidence(entry)
        first, last = origin.characters or (None, None)
        return NeighborEvidence(
            entry=entry,
            token_id=origin.token_id,
            text=self._tokenizer.token_text(origin.token_id),
            weight=share,
            distance=distance,
            document_id=origin.document.id,
            source=origin.document.source,
            character_start=first,
            character_end=last,
            line=origin.line,
            left_context=self._tokenizer.decode(origin.left_context),
            datastore=served.name,
            metadata=origin.document.metadata,
        )
