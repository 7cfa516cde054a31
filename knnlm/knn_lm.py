"""The kNN language model: p = λ·p_kNN + (1-λ)·p_LM (Khandelwal et al., 2020, section 2). The heart of the project.

:func:`mix_neighbors` is the one place where neighbours, distribution and interpolation meet; :meth:`KNNLanguageModel.mix`
searches one datastore, or a fixed mix of several, before it; a server's engine searches those that each row has chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knnlm.datastore_mix import NeighborSource, heaviest_first
from knnlm.distribution import knn_token_log_probs, neighbor_token_log_probs, spread, votes_for
from knnlm.errors import InvalidInput
from knnlm.following import context_of
from knnlm.gated import GatedRows, RowWeights, StoreGate
from knnlm.interpolation import interpolate, interpolate_at
from knnlm.mixture import Mixture
from knnlm.model import LanguageModel
from knnlm.neighbors import Neighbors
from knnlm.tokenization import TextTokenizer


@dataclass(frozen=True)
class Mixed:
    """One step's result for n rows: ``log_probs`` [n, vocabulary] of the mixture; ``neighbors`` [n, k]; ``votes``
    [n, k] float32, log p_kNN of each neighbour's token; ``weight`` [n] float64, the λ that was used; ``searched`` [n] bool,
    whether neighbours were searched at all; ``lm_log_probs`` [n, vocabulary] of the base LM alone."""

    log_probs: Tensor
    neighbors: Neighbors
    votes: Tensor
    weight: Tensor
    searched: Tensor
    lm_log_probs: Tensor

    @property
    def knn_log_probs(self) -> Tensor:
        """log p_kNN [n, vocabulary], -inf where no neighbour has the token and in rows that searched nothing."""
        return spread(self.neighbors, self.votes, self.log_probs.shape[1])

    def rows(self, rows: list[int]) -> Mixed:
        """Some of the rows, in this order."""
        neighbors = self.neighbors.each(lambda part: part[rows])
        others = (part[rows] for part in (self.votes, self.weight, self.searched, self.lm_log_probs))
        return Mixed(self.log_probs[rows], neighbors, *others)

    def knn_log_prob(self, row: int, token: int) -> float:
        """One value of :attr:`knn_log_probs`."""
        votes = self.votes[row][self.neighbors.tokens[row] == token]
        return float(votes.max()) if len(votes) else -math.inf

    def knn_share(self, row: int, token: int) -> float:
        """Part of the token's probability that came from the neighbours, 0 to 1."""
        knn, weight = self.knn_log_prob(row, token), float(self.weight[row])
        # A token that neither has can be drawn where all others were forbidden; at weight 0 neighbours may know one that the LM
        # finds all but impossible.
        return 0.0 if knn == -math.inf or weight == 0 else min(1.0, weight * math.exp(knn - float(self.log_probs[row, token])))


def mix_neighbors(lm_log_probs: Tensor, neighbors: Neighbors, *, temperature: Tensor | float, weights: RowWeights) -> Mixed:
    """Mix the LM's log-probabilities [n, vocabulary] with those of ``neighbors``; ``temperature`` one number or [n] float64.

    A row that ``weights`` did not search must have no neighbours; its distribution, that of any row without neighbours and
    that of a row whose gate says 0 is the LM's bit for bit.
    """
    if neighbors.ids.shape[1] == 0:
        used = torch.zeros_like(weights.searched, dtype=torch.float64)
        return Mixed(lm_log_probs, neighbors, neighbors.distances, used, weights.searched, lm_log_probs)
    neighbors = heaviest_first(neighbors, temperature)
    votes = neighbor_token_log_probs(neighbors, temperature)
    used = weights.of(neighbors, votes)
    mixed = interpolate_at(lm_log_probs, neighbors.tokens, votes, used)
    return Mixed(mixed, neighbors, votes, used, weights.searched, lm_log_probs)


def mix_targets(
    lm_log_probs: Tensor, targets: Tensor, neighbors: Neighbors, *, temperature: Tensor | float, weights: RowWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`mix_neighbors` of one token for each row, ``targets`` [n], without ever making p_kNN over the vocabulary.

    Log-probabilities of it by the LM, by the neighbours and by the mixture, [n] float32 each, and the λ that was used, [n] float64.
    """
    lm = lm_log_probs.gather(1, targets[:, None])[:, 0]
    # Only gates want to know the votes for all tokens.
    votes = neighbor_token_log_probs(neighbors, temperature) if weights.gated else None
    knn = knn_token_log_probs(neighbors, temperature, targets) if votes is None else votes_for(targets, neighbors, votes)
    used = weights.of(neighbors, votes)
    return lm, knn, interpolate(lm, knn, used), used


class KNNLanguageModel:
    """A base LM, a retriever over its datastore (or several as one), and the settings that apply where a call gives none:
    ``mixture``, and the ``gate`` that belongs to it (None: the mixture's weight for every token)."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, retriever: NeighborSource, mixture: Mixture | None = None,
        gate: StoreGate | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.retriever, self.gate = model, tokenizer, retriever, gate
        self.mixture = (mixture or Mixture()).validate()

    def mix(self, lm_log_probs: Tensor, queries: Tensor, *, k: Tensor, temperature: Tensor, weight: Tensor) -> Mixed:
        """Mix the LM's log-probabilities [n, vocabulary] with those of each query's neighbours.

        ``queries`` [n, dimension]; ``k`` int64, ``temperature`` and ``weight`` float64, each [n]. Rows with weight 0
        are not searched, and theirs is the LM's distribution bit for bit.
        """
        weights = RowWeights(weight)
        neighbors = self.retriever.retrieve(queries, torch.where(weights.searched, k, 0))
        return mix_neighbors(lm_log_probs, neighbors, temperature=temperature, weights=weights)

    def mix_all(self, lm_log_probs: Tensor, queries: Tensor, mixture: Mixture | None, contexts: Tensor | None = None) -> Mixed:
        """:meth:`mix` with the same settings for every row; None takes those of this model, with its gate, which asks for
        ``contexts`` [n, 16] as :class:`~knnlm.gated.GatedRows` has them."""
        settings, weights = self.settings(lm_log_probs, mixture, contexts)
        neighbors = self.retriever.retrieve(queries, torch.where(weights.searched, settings.k, 0))
        return mix_neighbors(lm_log_probs, neighbors, temperature=settings.temperature, weights=weights)

    def settings(self, lm_log_probs: Tensor, mixture: Mixture | None, contexts: Tensor | None) -> tuple[Mixture, RowWeights]:
        """The mixture that applies where a call gives ``mixture``, and λ of each row of a batch; as :meth:`mix_all`."""
        settings, gate = (self.mixture, self.gate) if mixture is None else (mixture.validate(), None)
        asked = torch.full((len(lm_log_probs),), settings.weight, dtype=torch.float64)
        if gate is None:
            return settings, RowWeights(asked)
        assert contexts is not None
        return settings, RowWeights(asked, lm_log_probs, [GatedRows(gate, torch.arange(len(asked)), contexts)])

    def next_token(
        self, text: str | Sequence[int], mixture: Mixture | None = None, *, cache: Any = None, before: Sequence[int] = ()
    ) -> Mixed:
        """The distribution over the token that follows ``text`` (or token ids), as a batch of one row.

        ``before``: the tokens that ``cache`` holds.
        """
        tokens = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        if not tokens:
            raise InvalidInput("text", "is empty and the tokenizer adds no BOS, so there is nothing to predict from.")
        if len(tokens) > self.model.context:
            raise InvalidInput("text", f"is {len(tokens)} tokens long, but the model's context is {self.model.context}.")
        if min(tokens) < 0 or max(tokens) >= self.model.vocabulary_size:
            raise InvalidInput(
                "text", f"has token ids from {min(tokens)} to {max(tokens)}, but the model's are 0 to {self.model.vocabulary_size - 1}."
            )
        ids = torch.tensor([tokens], device=self.model.device)
        out = self.model.forward(ids, columns=torch.tensor([len(tokens) - 1], device=ids.device), cache=cache)
        assert out.logits is not None
        contexts = torch.tensor([context_of([*before, *tokens])])
        return self.mix_all(out.logits[:, -1].float().log_softmax(-1).cpu(), out.keys[:, -1].cpu(), mixture, contexts)
